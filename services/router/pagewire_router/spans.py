"""What the router's spans say: of a request, in vLLM's words where it has any, and of its attempts and their legs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagewire.v1 import common_pb2
from pagewire_core.errors import PagewireError
from pagewire_core.tracing import Span

from pagewire_router.placement import Placed
from pagewire_router.request import ValidRequest
from pagewire_router.workers import Worker

_CALLS = {"prefill": "pagewire.v1.PrefillService/Prefill", "decode": "pagewire.v1.DecodeService/Decode"}


def describe_request(span: Span, request: ValidRequest) -> None:
    if not span.recording:
        return
    sampling = request.sampling
    span.set({
        "gen_ai.request.id": request.request_id,
        "gen_ai.request.model": request.model,
        "gen_ai.request.n": request.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.prompt_tokens": len(request.prompt_ids),
    })  # fmt: skip


def describe_outcome(
    span: Span, outcome: str, completion_tokens: int, seconds: Mapping[str, float], facts: Mapping[str, Any]
) -> None:
    """seconds: of what, by vLLM's names. facts: as in the log's line."""
    span.set({
        "pagewire.outcome": outcome,
        "gen_ai.usage.completion_tokens": completion_tokens,
        **{f"gen_ai.latency.{name}": value for name, value in seconds.items()},
        **{f"pagewire.{name}": value for name, value in facts.items()},
    })  # fmt: skip


def model_latencies(timings: common_pb2.StageTimings) -> dict[str, float]:
    """Seconds, by vLLM's names."""
    return {
        "time_in_queue": timings.queue_us / 1e6,
        "time_in_model_prefill": timings.prefill_us / 1e6,
        "time_in_model_decode": timings.decode_us / 1e6,
    }


class AttemptSpans:
    """The span of an attempt, and one for each leg's call; `close` ends what has not ended."""

    def __init__(self, request: Span, placed: Placed[Worker], number: int, *, resumed: bool) -> None:
        self.attempt = request.child("attempt")
        if self.attempt.recording:
            self.attempt.set(_plan(placed) | {"pagewire.attempt": number, "pagewire.resumed": resumed})
        self._legs: dict[str, Span] = {}

    def leg(self, leg: str, worker: Worker) -> Span:
        span = self._legs[leg] = self.attempt.child(_CALLS[leg], kind="client")
        if span.recording:
            where = {"rpc.system": "grpc", "server.address": worker.address, "pagewire.worker_id": worker.worker_id}
            span.set(where)
        return span

    def end_leg(self, leg: str, error: PagewireError | None) -> None:
        if error is not None:
            self._legs[leg].fail(error)
        self._legs[leg].end()

    def close(self, failure: BaseException | None, leg: str = "") -> None:
        """leg: the one that failed, if it was one."""
        if failure is not None:
            self.attempt.set({"pagewire.failed_leg": leg} if leg else {})
            self.attempt.fail(failure)
        for span in (*self._legs.values(), self.attempt):
            span.end()


def _plan(placed: Placed[Worker]) -> dict[str, str | int | float | bool]:
    said: dict[str, str | int | float | bool] = {
        "pagewire.decision": placed.decision,
        "pagewire.decode_worker": placed.decode.worker_id,
        "pagewire.predicted_ttft_ms": placed.predicted.ttft_ms,
        "pagewire.expected_cached_tokens": placed.hit_tokens,
        "pagewire.expected_computed_tokens": placed.compute_tokens,
    }
    if placed.prefill is not None:
        said["pagewire.prefill_worker"] = placed.prefill.worker_id
        said["pagewire.predicted_transfer_ms"] = placed.predicted.transfer_ms
    if placed.holder is not None and placed.fetch is not None:
        said["pagewire.fetch_from"] = placed.holder.worker_id
        said["pagewire.fetch_tokens"] = placed.fetch.tokens
    return said
