"""The HTTP application: every route, and errors in OpenAI's shape wherever they come from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import TypedDict

from pagewire_core.errors import Internal, PagewireError, Unavailable
from pagewire_core.telemetry import exposition, merge_expositions
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pagewire_bridge.client import RouterClient
from pagewire_bridge.disconnect import STATUS_CLIENT_GONE, ClientGone
from pagewire_bridge.observe import BridgeMetrics, Observe
from pagewire_bridge.openai.errors import INVALID_REQUEST, error_object, error_response, json_response
from pagewire_bridge.openai.routes import ROUTES

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class State(TypedDict):
    """What the lifespan gives to every request's `state`."""

    client: RouterClient
    metrics: BridgeMetrics


async def health(request: Request) -> Response:
    """200 with no body when the router can take requests."""
    if await request.state.client.is_serving():
        return Response()
    return error_response(Unavailable("No model can be served right now: the router or its workers are not ready."))


async def show_version(request: Request) -> Response:
    return json_response({"version": version("pagewire")})


async def metrics(request: Request) -> Response:
    """The bridge's metrics, and the router's and workers' while the router can be reached."""
    texts = {"bridge": exposition(request.state.metrics.registry)}
    try:
        texts["router"] = await request.state.client.metrics()
    except PagewireError:
        pass  # a scrape must still show the bridge; that the router is away shows in the missing samples
    return Response(merge_expositions(texts), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PagewireError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == HTTPStatus(error.status_code).phrase:  # the framework's own words say too little
        message = f"{message}: {request.method} {request.url.path}"
    body = error_object(message, INVALID_REQUEST, None, _CODES.get(error.status_code))
    return json_response(body, error.status_code, error.headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    return error_response(Internal("The server failed; its log has the reason."))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=STATUS_CLIENT_GONE)


def create_app(open_client: Callable[[], RouterClient], on_ready: Callable[[], None] = lambda: None) -> ASGIApp:
    """The ASGI application.

    open_client is called in the serving event loop, on_ready just before requests are taken.
    """
    bridge_metrics = BridgeMetrics()

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[State]:
        client = open_client()
        on_ready()
        yield {"client": client, "metrics": bridge_metrics}
        await client.close()

    app = Starlette(
        routes=[
            *ROUTES,
            Route("/health", health, methods=["GET"]),
            Route("/version", show_version, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={
            PagewireError: _on_error,
            HTTPException: _on_http_error,
            ClientGone: _on_client_gone,
            ClientDisconnect: _on_client_gone,
            Exception: _on_fault,  # starlette answers with it and raises the fault again, for Observe to log
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return Observe(app, bridge_metrics)
