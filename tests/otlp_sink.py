"""An OTLP collector that keeps what it is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@dataclass(frozen=True)
class Seen:
    """A span, as it came. Times in nanoseconds."""

    service: str
    instance: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    failed: bool
    message: str
    trace_state: str
    attributes: dict[str, Any] = field(hash=False)
    events: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.attributes[key]


class Sink(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, port: int) -> None:
        self.port = port
        self.spans: list[Seen] = []
        self.raw = b""  # all that came

    def Export(self, request: Any, context: Any) -> Any:
        self.raw += request.SerializeToString()
        for resource in request.resource_spans:
            about = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_seen(span, about) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def of(self, trace_id: str) -> list[Seen]:
        return [span for span in self.spans if span.trace_id == trace_id]


def children(spans: Sequence[Seen], parent: Seen, name: str) -> list[Seen]:
    """In the order in which they began."""
    found = [span for span in spans if span.parent_id == parent.span_id and span.name == name]
    return sorted(found, key=lambda span: span.start)


@contextlib.contextmanager
def listening(port: int = 0) -> Iterator[tuple[Sink, str]]:
    """A sink and its endpoint."""
    sink = Sink(port)
    sink.start()
    try:
        yield sink, f"http://127.0.0.1:{sink.port}"
    finally:
        sink.stop()


def _seen(span: Span, about: dict[str, Any]) -> Seen:
    return Seen(
        about["service.name"], about["service.instance.id"], span.name,
        Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(), span.trace_id.hex(), span.span_id.hex(),
        span.parent_span_id.hex(), span.start_time_unix_nano, span.end_time_unix_nano,
        span.status.code == Status.STATUS_CODE_ERROR, span.status.message, span.trace_state, _values(span.attributes),
        tuple(event.name for event in span.events),
    )  # fmt: skip


def _values(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None
