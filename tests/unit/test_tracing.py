"""Spans: what becomes of a caller's place in its trace, what is exported, and what never is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from otlp_sink import Sink, children, listening
from pagewire_cli.tgi_flags import translated
from pagewire_core import trace_export, tracing
from pagewire_core.command_line import Parser, add_flags
from pagewire_core.errors import InvalidRequest, StartupError, Unavailable
from pagewire_core.flags import WORKER_FLAGS
from pagewire_core.rpc import request_metadata
from processes import free_port

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
HEADERS = (("traceparent", PARENT), ("tracestate", "vendor=1"))


@pytest.fixture
def sink() -> Iterator[Sink]:
    """Tracing is on in this process."""
    with listening() as (sink, endpoint):
        tracing.configure("router", endpoint, None, "router-1")
        yield sink
        tracing.close()


@pytest.fixture(autouse=True)
def nowhere() -> Iterator[None]:
    yield
    tracing.enter(tracing.NOWHERE)
    structlog.contextvars.clear_contextvars()


def test_a_service_without_tracing_hands_on_where_its_caller_is() -> None:
    """A trace must not break at the one service that has it off."""
    tracing.enter(tracing.received([("x-request-id", "r"), *HEADERS]))
    with tracing.begin("llm_request") as span, span.child("attempt") as child:
        child.set({"a": 1})
        child.event("b")
        child.fail(Unavailable("c"))
    assert child.headers == HEADERS and not child.recording
    assert request_metadata("r") == (("x-request-id", "r"), *HEADERS)
    assert "trace_id" not in structlog.contextvars.get_contextvars()


@pytest.mark.parametrize(
    "parent",
    [
        "", "0", PARENT[:-1], PARENT + "-x", PARENT + "0", PARENT.upper(), "ff" + PARENT[2:],
        f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{'0' * 16}-01", PARENT.replace("-", "_"), f"0é-{TRACE}-{CALLER}-01",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_counts_as_not_said(parent: str) -> None:
    assert tracing.received([("traceparent", parent), ("tracestate", "a=1")]) is tracing.NOWHERE


def test_several_lines_of_tracestate_are_one_and_a_bad_one_is_left_out() -> None:
    two = [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]
    assert tracing.received(two).headers == (("traceparent", PARENT), ("tracestate", "a=1,b=2"))
    for bad in ("é=1", "a\n=1", "x" * 513, "\x00"):
        assert tracing.received([("traceparent", PARENT), ("tracestate", bad)]).headers == (("traceparent", PARENT),)


@given(st.lists(st.tuples(st.sampled_from(["traceparent", "tracestate", "other"]), st.text())))
def test_whatever_a_client_sends_can_be_sent_on(headers: list[tuple[str, str]]) -> None:
    """gRPC refuses a call with metadata that is not printable ASCII: that would be a way to fail one's own request."""
    for _, value in tracing.received([*headers, ("traceparent", PARENT)]).headers:
        assert value.isascii() and value.isprintable()


def test_spans_reach_the_collector_as_a_tree_of_the_callers_trace(sink: Sink) -> None:
    tracing.enter(tracing.received(HEADERS))
    began = time.monotonic()
    with tracing.begin("llm_request", {"gen_ai.request.n": 2}) as whole:
        assert structlog.contextvars.get_contextvars()["trace_id"] == TRACE
        whole.child("admission", started=began - 2).end(began - 1)
        with pytest.raises(Unavailable), whole.child("attempt", kind="client") as attempt:
            headers = dict(attempt.headers)
            raise Unavailable("the worker was lost")
        whole.end()
        whole.end()  # twice is once
        whole.set({"late": 1})
    tracing.close()
    [top] = [span for span in sink.spans if span.name == "llm_request"]
    assert (top.service, top.instance, top.kind, top.trace_id, top.parent_id) == (
        "pagewire-router", "router-1", "server", TRACE, CALLER)  # fmt: skip
    assert top.trace_state == "vendor=1" and not top.failed and top.attributes == {"gen_ai.request.n": 2}
    [admission] = children(sink.spans, top, "admission")
    assert admission.end - admission.start == pytest.approx(1e9, abs=1e6)
    [failed] = children(sink.spans, top, "attempt")
    assert failed.failed and failed.message == "the worker was lost" and failed["error.type"] == "Unavailable"
    assert headers == {"traceparent": f"00-{TRACE}-{failed.span_id}-01", "tracestate": "vendor=1"}


def test_what_began_after_its_parent_says_so(sink: Sink) -> None:
    """Whether told at the time or later: on a busy machine, readings of two clocks are milliseconds apart."""
    tracing.enter(tracing.received(HEADERS))
    whole = tracing.begin("whole")
    times = [time.monotonic() for _ in range(200)]
    for began in times:
        whole.child("part", started=began).end(time.monotonic())
    whole.end()
    tracing.close()
    [told] = [span for span in sink.spans if span.name == "whole"]
    parts = children(sink.spans, told, "part")
    for began, part in zip(times, parts, strict=True):
        assert told.start <= part.start <= part.end <= told.end
        assert abs((part.start - parts[0].start) - (began - times[0]) * 1e9) < 1e3


def test_a_caller_that_does_not_record_is_heeded(sink: Sink) -> None:
    tracing.enter(tracing.received([("traceparent", PARENT[:-1] + "0")]))
    with tracing.begin("llm_request") as span:
        [(_, parent)] = span.headers
    assert parent.startswith(f"00-{TRACE}-") and parent.endswith("-00")
    tracing.close()
    assert not sink.spans


def test_a_clients_own_mistakes_are_no_errors_and_are_not_quoted(sink: Sink) -> None:
    """The sentence of a refusal may have a piece of what was sent in it."""
    for error in (InvalidRequest("'my secret' is no value"), asyncio.CancelledError(), ValueError("my secret")):
        with pytest.raises(type(error)), tracing.begin("llm_request"):
            raise error
    tracing.close()
    assert [span.failed for span in sink.spans] == [False, False, True]
    assert [span["error.type"] for span in sink.spans] == ["InvalidRequest", "CancelledError", "ValueError"]
    assert b"my secret" not in sink.raw


def test_a_collector_that_is_not_there_is_one_line_in_the_log_and_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_export, "_FLUSH_S", 0.1)  # of 2 s, all of which it would take
    with structlog.testing.capture_logs() as lines:
        tracing.configure("bridge", f"http://127.0.0.1:{free_port()}", None, "b")
        for _ in range(5000):  # more than are kept
            tracing.begin("x").end()
        tracing.close()
    complaints = [line for line in lines if line["event"] == "spans are not exported"]
    assert len(complaints) == 1 and complaints[0]["log_level"] == "warning"


def test_names_and_sampling_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with listening() as (sink, endpoint):
        for name in (None, "flag"):
            tracing.configure("router", endpoint, name, "1")
            tracing.enter(tracing.NOWHERE)
            tracing.begin("not sampled").end()
            tracing.enter(tracing.received(HEADERS))
            tracing.begin("asked for").end()
            tracing.close()
    assert [(span.name, span.service) for span in sink.spans] == [("asked for", "chat"), ("asked for", "flag")]


def test_variables_that_cannot_be_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "soon")
    with pytest.raises(StartupError, match=r"tracing cannot begin: .*soon.*OTEL_"):
        tracing.configure("router", "http://127.0.0.1:1", None, "1")


def test_the_flag_takes_an_address_of_grpc_alone(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"PAGEWIRE_OTLP_TRACES_ENDPOINT": "http://collector:4317"}
    add_flags(parser := Parser(prog="p", environ=environ), WORKER_FLAGS)
    assert parser.parse_args([]).otlp_traces_endpoint == "http://collector:4317"
    for good in ("https://c:4317", "grpc://localhost:4317", "localhost:4317", "http://[::1]:4317/"):
        assert parser.parse_args(["--otlp-traces-endpoint", good]).otlp_traces_endpoint == good
    for bad in ("collector", "http://c", "http://c:4318/v1/traces", "tcp://c:1", "http://:4317"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--otlp-traces-endpoint", bad])
        assert "write http://host:4317" in capsys.readouterr().err


def test_tgis_flags_mean_ours() -> None:
    given, ignored = translated(["--otlp-endpoint", "http://c:4317"], {"OTLP_SERVICE_NAME": "tgi", "MODEL_ID": "m"})
    assert {"--otlp-traces-endpoint=http://c:4317", "--otlp-service-name=tgi", "--model=m"} == set(
        given
    ) and not ignored
