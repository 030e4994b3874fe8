"""One request is one trace, from the bridge through both legs and the transfer; whatever becomes of it or of the
collector."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cluster import PAIRS, SMALL, Cluster, running
from otlp_sink import Seen, Sink, children, listening
from processes import free_port
from streams import prompt_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLER = "b7ad6b7169203331"
SECRET = "zebra quartz"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traced(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Cluster, Sink]]:
    with pytest.MonkeyPatch.context() as patch, listening(free_port()) as (sink, endpoint):
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        flags = (f"--otlp-traces-endpoint={endpoint}",)
        cluster = Cluster(
            llama, tmp_path_factory.mktemp("traced"), decode=2, worker_flags=(*SMALL, *flags),
            router_flags=(*PAIRS, *flags), bridge_flags=flags, with_faults=True,
        )  # fmt: skip
        async with running(cluster):
            yield cluster, sink


def parent_of(trace_id: str, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{CALLER}-{flags}", "tracestate": "vendor=1"}


async def spans_of(cluster: Cluster, sink: Sink, trace_id: str, name: str, count: int = 1) -> list[Seen]:
    """All of the trace, once so many of that name are there: a request's are not all exported at the same time."""

    async def there() -> bool:
        return sum(span.name == name for span in sink.of(trace_id)) >= count

    await cluster.until(there, f"no {name} in {[span.name for span in sink.of(trace_id)]}")
    return sink.of(trace_id)


def only(spans: list[Seen], parent: Seen, name: str) -> Seen:
    [found] = children(spans, parent, name)
    # The clock is the machine's, but each process sets its own by it, and it may be corrected in between.
    apart = 1e6 if found.instance == parent.instance else 20e6
    assert parent.start - apart <= found.start <= found.end <= parent.end + apart, (parent, found)
    return found


async def test_one_trace_has_the_tree_of_both_legs_and_the_transfer(traced: tuple[Cluster, Sink]) -> None:
    cluster, sink = traced
    trace_id = "11" * 16
    body = {"prompt": SECRET * 5, "max_tokens": 8, "ignore_eos": True, "temperature": 0.5}
    response = await cluster.http.post("/v1/completions", json=body, headers=parent_of(trace_id))
    assert response.status_code == 200
    await cluster.settle()

    async def whole() -> bool:  # each process exports its own, and not all at the same time
        return len(sink.of(trace_id)) >= 14

    await cluster.until(whole, f"there are only {[span.name for span in sink.of(trace_id)]}")
    spans = sink.of(trace_id)

    [http] = [span for span in spans if span.parent_id == CALLER]
    assert (http.name, http.kind, http.service) == ("POST /v1/completions", "server", "pagewire-bridge")
    assert (http["http.route"], http["http.response.status_code"]) == ("/v1/completions", 200)
    request = only(spans, http, "llm_request")
    assert (request.kind, request.service, request["pagewire.outcome"]) == ("server", "pagewire-router", "ok")
    assert request["gen_ai.usage.prompt_tokens"] == 60 and request["gen_ai.usage.completion_tokens"] == 8
    assert request["gen_ai.request.max_tokens"] == 8 and request["gen_ai.request.temperature"] == 0.5
    assert 0 < request["gen_ai.latency.time_to_first_token"] <= request["gen_ai.latency.e2e"]
    assert request["gen_ai.request.id"] == http["pagewire.request_id"] == response.headers["x-request-id"]
    assert request.events == ("first_token",)
    only(spans, request, "admission")
    attempt = only(spans, request, "attempt")
    assert (attempt["pagewire.attempt"], attempt["pagewire.decision"]) == (1, "pair")

    legs = {}
    for role, call, stages in (
        ("prefill", "pagewire.v1.PrefillService/Prefill", ("queue", "prefill")),
        ("decode", "pagewire.v1.DecodeService/Decode", ("await_kv", "decode")),
    ):
        leg = only(spans, attempt, call)
        worker = legs[role] = only(spans, leg, call)
        assert (leg.kind, worker.kind, leg.service, worker.service) == (
            "client", "server", "pagewire-router", "pagewire-worker")  # fmt: skip
        assert worker.instance == leg["pagewire.worker_id"] == attempt[f"pagewire.{role}_worker"]
        for stage in stages:
            only(spans, worker, stage)
    assert only(spans, legs["prefill"], "prefill")["pagewire.computed_tokens"] == 60
    transfer = only(spans, legs["prefill"], "transfer")
    received = only(spans, transfer, "receive")
    assert received.instance == legs["decode"].instance and received["pagewire.peer"] == legs["prefill"].instance
    for span in (transfer, received, request, legs["decode"]):
        assert span["pagewire.transferred_bytes"] == 60 * 384
        assert (span["pagewire.transferred_tokens"], span["pagewire.lane"]) == (60, "shm")
    assert len(spans) == 14 and not any(span.failed for span in spans)
    assert {span.trace_state for span in spans} == {"vendor=1"}
    assert SECRET.encode() not in sink.raw and response.json()["choices"][0]["text"].encode() not in sink.raw
    for name in ("bridge", "router", "prefill-0"):
        assert any(line.get("trace_id") == trace_id for line in lines(cluster, name)), name
    assert "spans are not exported" not in cluster.logs()


def lines(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cluster.processes[name].log.read_text().splitlines() if line.startswith("{")]


async def test_a_caller_decides_whether_its_trace_is_recorded(traced: tuple[Cluster, Sink]) -> None:
    cluster, sink = traced
    answer = await cluster.http.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=parent_of("22" * 16, "00")
    )
    refused = await cluster.http.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 9999}, headers=parent_of("33" * 16)
    )
    vector = await cluster.http.post(
        "/v1/embeddings", json={"input": ["a", "b"], "model": str(cluster.model)}, headers=parent_of("44" * 16)
    )
    assert (answer.status_code, refused.status_code, vector.status_code) == (200, 400, 200)
    await spans_of(cluster, sink, "33" * 16, "POST /v1/completions")
    spans = await spans_of(cluster, sink, "33" * 16, "llm_request")
    [request] = [span for span in spans if span.name == "llm_request"]
    assert request["error.type"] == "ContextLength" and not any(span.failed for span in spans)
    spans = await spans_of(cluster, sink, "44" * 16, "pagewire.v1.PrefillService/Embed", 2)
    assert not sink.of("22" * 16)
    assert any(line.get("trace_id") == "22" * 16 for line in lines(cluster, "router"))


async def test_a_stream_that_outlives_its_decode_worker_is_still_one_trace(traced: tuple[Cluster, Sink]) -> None:
    """What the dead worker had not exported is lost with it; its leg is told by the router."""
    cluster, sink = traced
    trace_id = "55" * 16
    assert cluster.faults is not None
    (cluster.faults / "step:decode:kill").write_text("after=9")
    body = {"prompt": prompt_of(40, 1), "max_tokens": 60, "ignore_eos": True, "stream": True, "temperature": 0}
    with cluster.slow_steps():  # else nine steps may be over before the router has anything to go on after
        answer = await cluster.http.post("/v1/completions", json=body, headers=parent_of(trace_id))
    assert answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text
    for name, count in (("POST /v1/completions", 1), ("llm_request", 1), ("pagewire.v1.DecodeService/Decode", 3)):
        spans = await spans_of(cluster, sink, trace_id, name, count)
    [request] = [span for span in spans if span.name == "llm_request"]
    lost, second = children(spans, request, "attempt")
    assert lost.failed and (lost["pagewire.failed_leg"], lost["error.type"]) == ("decode", "Unavailable")
    assert only(spans, lost, "pagewire.v1.DecodeService/Decode").failed
    assert not second.failed and second["pagewire.resumed"] and second["pagewire.attempt"] == 2
    assert second["pagewire.decode_worker"] != lost["pagewire.decode_worker"]
    leg = only(spans, second, "pagewire.v1.DecodeService/Decode")
    assert only(spans, leg, "pagewire.v1.DecodeService/Decode")["pagewire.resumed"]
    assert not request.failed and request["pagewire.attempts"] == 2
    await cluster.mend()


async def test_a_collector_may_go_and_come_back(traced: tuple[Cluster, Sink]) -> None:
    cluster, sink = traced
    sink.stop()
    assert await cluster.complete("a", max_tokens=2)
    sink.start()
    headers = parent_of("66" * 16)
    answer = await cluster.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}, headers=headers)
    assert answer.status_code == 200
    await spans_of(cluster, sink, "66" * 16, "pagewire.v1.DecodeService/Decode", 2)
