"""What one request cost and who served it: the Summary for the client, one log line, the metrics, the span."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
from pagewire.v1 import common_pb2, decode_pb2, inference_pb2, prefill_pb2
from pagewire_core import tracing
from pagewire_core.block_hash import HASH_BLOCK

from pagewire_router.admission import Slot
from pagewire_router.metrics import RouterMetrics
from pagewire_router.placement import Placed
from pagewire_router.spans import describe_outcome, model_latencies
from pagewire_router.workers import Worker

log = structlog.get_logger(__name__)


@dataclass
class Account:
    """Filled in as a request goes; times are of the monotonic clock, in seconds."""

    request_id: str
    prompt_tokens: int
    slot: Slot
    span: tracing.Span = field(default_factory=tracing.current)
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    attempts: int = 0
    attempt_at: float = 0.0
    placed: Placed[Worker] | None = None
    resumed: bool = False
    computed_by_decode: bool = False  # the prompt, there being no prefill worker for it
    prefill_cached: int = 0
    started: decode_pb2.DecodeStarted = field(default_factory=decode_pb2.DecodeStarted)
    kv_sent: prefill_pb2.KvSent = field(default_factory=prefill_pb2.KvSent)
    fetched: common_pb2.Fetched = field(default_factory=common_pb2.Fetched)
    finished: decode_pb2.DecodeFinished = field(default_factory=decode_pb2.DecodeFinished)
    last_token: dict[int, float] = field(default_factory=dict)  # choice -> when

    def admit(self, metrics: RouterMetrics) -> None:
        self.admitted = time.monotonic()
        metrics.queue_s.observe(self.admitted - self.arrived)
        self.span.child("admission", started=self.arrived).end(self.admitted)

    def begin_attempt(self, placed: Placed[Worker], *, resumed: bool = False) -> None:
        """resumed: it goes on where one was lost, whose prompt is the one that is accounted for."""
        self.attempts += 1
        self.attempt_at = time.monotonic()
        self.slot.placed(placed.compute_tokens)
        self.placed = placed
        self.resumed = resumed
        self.finished = decode_pb2.DecodeFinished()
        if not resumed:
            self.computed_by_decode = placed.prefill is None
            self.prefill_cached = 0
            self.started, self.kv_sent = decode_pb2.DecodeStarted(), prefill_pb2.KvSent()
            self.fetched = common_pb2.Fetched()

    def note_prefill(self, started: prefill_pb2.PrefillStarted) -> None:
        if not self.resumed:
            self.prefill_cached = started.cached_tokens
            self.fetched.CopyFrom(started.fetched)

    def note_kv_sent(self, sent: prefill_pb2.KvSent, metrics: RouterMetrics) -> None:
        if self.placed is not None:
            predicted = self.placed.predicted.transfer_ms / 1000
            metrics.predicted("transfer", self.placed.decision, predicted, sent.timings.kv_tail_us / 1e6)
        if not self.resumed:
            self.kv_sent.CopyFrom(sent)

    def note_decode(self, started: decode_pb2.DecodeStarted) -> None:
        if not self.resumed:
            self.started.CopyFrom(started)
            if started.HasField("fetched"):
                self.fetched.CopyFrom(started.fetched)

    def note_tokens(self, choice: int, count: int, metrics: RouterMetrics) -> None:
        now = time.monotonic()
        self.slot.generated(count)
        if self.first_token is None:
            self.first_token = now
            metrics.ttft_s.observe(now - self.arrived)
            self.span.event("first_token")
            if self.placed is not None:
                predicted = self.placed.predicted.ttft_ms / 1000
                metrics.predicted("ttft", self.placed.decision, predicted, now - self.attempt_at)
        previous = self.last_token.get(choice)
        if previous is not None:
            metrics.itl_s.observe((now - previous) / count, count)
        self.last_token[choice] = now

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens computed for this request, by the worker that did it.

        What a decode worker holds spares the wire, not the prefill worker, so it does not count for a pair.
        """
        return self.prompt_tokens - (self.started.cached_tokens if self.computed_by_decode else self.prefill_cached)

    def _judge_hits(self, metrics: RouterMetrics) -> None:
        """What the index promised, against what was found; in whole hash blocks, which is all that it knows."""
        assert self.placed is not None
        if self.attempts > 1:
            return  # what was found is what an earlier attempt left
        found = _whole_blocks(self.prompt_tokens - self.computed_tokens - self.fetched.tokens)
        expected = _whole_blocks(min(self.placed.hit_tokens, self.prompt_tokens - 1))
        metrics.expected_hits.inc(expected)
        metrics.false_hits.inc(max(expected - found, 0))
        metrics.unexpected_hits.inc(max(found - expected, 0))

    def timings(self) -> common_pb2.StageTimings:
        """The prefill worker's and the decode worker's stages; queue includes the router's."""
        prompt = self.finished.timings if self.computed_by_decode else self.kv_sent.timings
        waited = (self.admitted or time.monotonic()) - self.arrived
        return common_pb2.StageTimings(
            queue_us=int(waited * 1e6) + prompt.queue_us,
            prefill_us=prompt.prefill_us,
            transfer_us=prompt.transfer_us,
            decode_us=self.finished.timings.decode_us,
            kv_tail_us=prompt.kv_tail_us,
        )

    def summary(self, completion_tokens: int) -> inference_pb2.Summary:
        assert self.placed is not None
        ttft = (self.first_token or time.monotonic()) - self.arrived
        return inference_pb2.Summary(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=self.prompt_tokens - self.computed_tokens,
            computed_tokens=self.computed_tokens,
            transferred_tokens=self.started.received_tokens or self.kv_sent.transferred_tokens,
            transferred_bytes=self.started.received_bytes or self.kv_sent.transferred_bytes,
            lane=self.started.lane or self.kv_sent.lane,
            prefill_worker=self.placed.prefill.worker_id if self.placed.prefill else "",
            decode_worker=self.placed.decode.worker_id,
            attempts=self.attempts,
            timings=self.timings(),
            time_to_first_token_us=int(ttft * 1e6),
            total_us=int((time.monotonic() - self.arrived) * 1e6),
            kv_overlap=self.kv_sent.overlap,
            resent_chunks=self.kv_sent.resent_chunks,
            fetched_tokens=self.fetched.tokens,
            fetched_bytes=self.fetched.bytes,
        )

    def close(self, outcome: str, answer_tokens: Sequence[int], metrics: RouterMetrics) -> None:
        """The request is over: counts it and writes its line. answer_tokens: of each choice."""
        now, completion_tokens = time.monotonic(), sum(answer_tokens)
        metrics.requests.labels(outcome).inc()
        metrics.e2e_s.observe(now - self.arrived)
        metrics.prompt_tokens.inc(self.prompt_tokens)
        metrics.generation_tokens.inc(completion_tokens)
        metrics.prompt_length.observe(self.prompt_tokens)
        metrics.answer_length.observe(completion_tokens)
        metrics.longest_answer.observe(max(answer_tokens, default=0))
        if self.admitted is not None:
            metrics.inference_s.observe(now - self.admitted)
            metrics.token_s.observe((now - self.admitted) / max(completion_tokens, 1))
        facts: dict[str, object] = {}
        if self.placed is not None:
            facts = self._facts(self.summary(completion_tokens))
            if outcome == "ok":
                self._judge_hits(metrics)
                metrics.cached_tokens.inc(self.prompt_tokens - self.computed_tokens)
        if self.span.recording:
            told = {"attempts": self.attempts, **facts}
            describe_outcome(self.span, outcome, completion_tokens, self._latencies(now), told)
        log.info(
            "request finished",
            request_id=self.request_id,
            outcome=outcome,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            attempts=self.attempts,
            ttft_ms=_ms(self.first_token - self.arrived) if self.first_token is not None else None,
            total_ms=_ms(now - self.arrived),
            **facts,
        )

    def _latencies(self, now: float) -> dict[str, float]:
        """Seconds, by vLLM's names."""
        seconds = {"e2e": now - self.arrived}
        if self.first_token is not None:
            seconds["time_to_first_token"] = self.first_token - self.arrived
        return seconds | model_latencies(self.timings()) if self.placed is not None else seconds

    def _facts(self, summary: inference_pb2.Summary) -> dict[str, object]:
        timings = summary.timings
        return {
            "cached_tokens": summary.cached_tokens,
            "computed_tokens": summary.computed_tokens,
            "transferred_tokens": summary.transferred_tokens,
            "transferred_bytes": summary.transferred_bytes,
            "lane": summary.lane,
            "prefill_worker": summary.prefill_worker,
            "decode_worker": summary.decode_worker,
            "queue_ms": timings.queue_us / 1000,
            "prefill_ms": timings.prefill_us / 1000,
            "transfer_ms": timings.transfer_us / 1000,
            "kv_tail_ms": timings.kv_tail_us / 1000,
            "kv_overlap": round(summary.kv_overlap, 3),
            "resent_chunks": summary.resent_chunks,
            "fetched_tokens": summary.fetched_tokens,
            "decode_ms": timings.decode_us / 1000,
        }


def _whole_blocks(tokens: int) -> int:
    return tokens // HASH_BLOCK * HASH_BLOCK


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
