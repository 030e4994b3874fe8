"""Around every HTTP request: its id, one log line, metrics, its span, and a trace of our own faults."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import structlog
from pagewire_core import tracing
from pagewire_core.rpc import REQUEST_ID_KEY
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagewire_bridge.anthropic import errors as anthropic
from pagewire_bridge.disconnect import STATUS_CLIENT_GONE
from pagewire_bridge.error_shapes import error_shape
from pagewire_bridge.openai.schema import is_sane_request_id

log = structlog.get_logger(__name__)

_PROBES = ("/health", "/ping", "/version", "/metrics", "/v2/health/live", "/v2/health/ready")
_NO_ROUTE = "other"
_FROM_THE_START = ("200", "429", "500", "503")  # of a counter that appears with its first count nobody sees an increase


class BridgeMetrics:
    """The bridge's own numbers, in a registry of their own. instance: what they call it."""

    def __init__(self, instance: str = "bridge") -> None:
        self.instance = instance
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pagewire_bridge_requests", "HTTP requests by their end", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "pagewire_bridge_request_seconds",
            "Arrival of an HTTP request to its last byte",
            ["route"],
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
            registry=self.registry,
        )
        self.num_in_flight = 0
        in_flight = Gauge(
            "pagewire_bridge_requests_in_flight", "HTTP requests not yet answered to the end", registry=self.registry
        )
        in_flight.set_function(lambda: self.num_in_flight)


class Observe:
    """ASGI middleware; outermost.

    Fills scope["state"]: request_id (a sane X-Request-Id of the client, else minted), named_by_client,
    client_gone (set by a stream that lost its client).
    """

    def __init__(self, app: ASGIApp, metrics: BridgeMetrics, routes: Sequence[Route]) -> None:
        self._app = app
        self._metrics = metrics
        self._names = {route.endpoint: route.path_format for route in reversed(routes)}
        for name in {*self._names.values()} - {*_PROBES}:
            for status in _FROM_THE_START:
                metrics.requests.labels(name, status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_KEY, "")
        sane = is_sane_request_id(given)
        state.update(request_id=given if sane else uuid.uuid4().hex, named_by_client=sane, client_gone=False)
        structlog.contextvars.clear_contextvars()
        tracing.enter(tracing.received(headers.items()))
        span = _begin_span(scope)
        exchange = _Exchange(self._app, scope, send)
        begin = time.perf_counter()
        self._metrics.num_in_flight += 1
        try:
            await exchange.run(receive)
        finally:
            self._metrics.num_in_flight -= 1
            self._record(scope, span, exchange.status, time.perf_counter() - begin)

    def _record(self, scope: Scope, span: tracing.Span, status: int, seconds: float) -> None:
        # A bounded set of names, whatever clients ask for.
        state, route = scope["state"], self._names.get(scope.get("endpoint", self), _NO_ROUTE)
        status = STATUS_CLIENT_GONE if state["client_gone"] else status
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        _end_span(span, scope["method"], route, status)
        write = log.debug if route in _PROBES and status < 400 else log.info
        write(
            "http request", request_id=state["request_id"], method=scope["method"], path=scope["path"], status=status,
            ms=round(seconds * 1e3, 1),
        )  # fmt: skip


def _begin_span(scope: Scope) -> tracing.Span:
    """Named when its route is known. Probes and scrapes have none."""
    if scope["path"] in _PROBES:
        return tracing.Span()
    span = tracing.begin(scope["method"])
    if span.recording:
        span.set({
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "network.protocol.version": scope["http_version"],
            "pagewire.request_id": scope["state"]["request_id"],
        })  # fmt: skip
    return span


def _end_span(span: tracing.Span, method: str, route: str, status: int) -> None:
    if span.recording:
        if route != _NO_ROUTE:
            span.rename(f"{method} {route}")
            span.set({"http.route": route})
        span.set({"http.response.status_code": status})
        if status >= 500 or not status:
            span.fail(str(status or "disconnected"))
        span.end()


class _Exchange:
    """One request and what became of it; status is 0 while no response has begun."""

    def __init__(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        self.status = 0
        self._complete = False
        self._app = app
        self._scope = scope
        self._send_out = send

    async def run(self, receive: Receive) -> None:
        try:
            await self._app(self._scope, receive, self._send)
        except Exception:  # the one broad except of the bridge: a fault of ours is logged with its request
            log.exception("request failed in the bridge", request_id=self._scope["state"]["request_id"])
            if not self._complete:
                raise  # too late for a 500: the server cuts the connection, and the client sees that

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID_KEY] = self._scope["state"]["request_id"]
            if error_shape(self._scope["path"]) is anthropic:
                headers["request-id"] = headers[REQUEST_ID_KEY]  # where its clients look
        self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send_out(message)
