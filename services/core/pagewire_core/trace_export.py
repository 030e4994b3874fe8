"""Spans on their way to an OTLP collector. Imported only where there is one: this is OpenTelemetry's SDK.

OTEL_* variables that the SDK knows are heeded: sampling (OTEL_TRACES_SAMPLER), batches (OTEL_BSP_*), certificates,
headers and timeouts of the exporter (OTEL_EXPORTER_OTLP_*), attributes of the service (OTEL_RESOURCE_ATTRIBUTES).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from importlib.metadata import version

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pagewire_core.errors import StartupError
from pagewire_core.tracing import Attributes, Kind, Span

log = structlog.get_logger(__name__)

_FLUSH_S, _GIVE_UP_S = 2.0, 0.5
_COMPLAIN_EVERY_S = 60.0
_SET_CLOCK_EVERY_S = 60.0  # the time of day may be corrected while we run
_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_W3C = TraceContextTextMapPropagator()


class OtlpRecorder:
    """A Recorder; a thread exports what has ended. Spans are dropped where the collector takes too few of them."""

    def __init__(self, service: str, endpoint: str, name: str | None, instance: str | None) -> None:
        _Complaints.hear(endpoint)
        try:
            self._exporter = OTLPSpanExporter(endpoint=endpoint)
            self._provider = TracerProvider(resource=_resource(service, name, instance), shutdown_on_exit=False)
        except Exception as error:  # whatever OTEL_* variables say that cannot be
            raise StartupError(f"tracing cannot begin: {error}; look at the variables OTEL_*") from error
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("pagewire", version("pagewire"))
        self._ahead_ns, self._set_clock_at = 0, 0.0

    def start(self, name: str, kind: Kind, parent: Span, attributes: Attributes | None, started: float | None) -> Span:
        if parent.recorded is not None:
            context = set_span_in_context(parent.recorded, Context())
        else:
            context = _W3C.extract(dict(parent.headers), Context())
        recorded = self._tracer.start_span(
            name, context, _KINDS[kind], attributes, start_time=self.wall_ns(started), record_exception=False
        )
        return Span(recorded=recorded)

    def wall_ns(self, monotonic: float | None) -> int:
        """The time of day at which the monotonic clock was there; None: now.

        All spans of a process are told by one clock: a part never seems to begin before the whole.
        """
        now = time.monotonic()
        if now >= self._set_clock_at:
            self._ahead_ns, self._set_clock_at = _wall_ahead_of_monotonic_ns(), now + _SET_CLOCK_EVERY_S
        return self._ahead_ns + int((now if monotonic is None else monotonic) * 1e9)

    def close(self) -> None:
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(_FLUSH_S)
        if ending.is_alive():
            self._exporter.shutdown()
            ending.join(_GIVE_UP_S)


def _wall_ahead_of_monotonic_ns() -> int:
    """The two clocks are read apart, and this thread may wait in between: the closest of a few readings counts."""
    readings = []
    for _ in range(5):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


def _resource(service: str, name: str | None, instance: str | None) -> Resource:
    instance = instance or f"{socket.gethostname()}:{os.getpid()}"
    said = Resource.create({"service.instance.id": instance, "service.version": version("pagewire")})
    if name or str(said.attributes["service.name"]).startswith("unknown_service"):
        said = said.merge(Resource({"service.name": name or f"pagewire-{service}"}))
    return said


class _Complaints(logging.Handler):
    """What the SDK says of a collector that cannot be reached, now and then instead of every second."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(logging.WARNING)
        self._endpoint = endpoint
        self._quiet_until = 0.0

    @classmethod
    def hear(cls, endpoint: str) -> None:
        said_by = logging.getLogger("opentelemetry")
        said_by.propagate = False
        said_by.handlers = [cls(endpoint)]

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._quiet_until:
            self._quiet_until = now + _COMPLAIN_EVERY_S
            log.warning("spans are not exported", endpoint=self._endpoint, error=record.getMessage())
