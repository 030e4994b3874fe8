"""The router's Prometheus metrics. Their names are part of the interface."""

from __future__ import annotations

from pagewire.v1 import common_pb2
from pagewire_core.quick_histogram import QuickCollector, QuickHistogram
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_GAP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2, 5)
_TEXT_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_CHOICES = (1, 2, 5, 10, 20)
_ERROR_S = (-4, -2, -1, -0.5, -0.2, -0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4)
# There from the start: of a counter that appears with its first count, Prometheus sees no increase.
_OUTCOMES = ("ok", "cancelled", "rejected", "unavailable", "deadline", "internal")
_LEGS = ("reserve", "prefill", "decode")
_PLANS = ("pair", "local")
_MENDED_BY = ("snapshot", "worker", "forgotten")


class RouterMetrics:
    """Every metric of one router, in a registry of its own. instance: what they call it."""

    def __init__(self, instance: str = "router") -> None:
        self.instance = instance
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("pagewire_requests", "Requests by how they ended", ["outcome"], registry=registry)
        self.validation_s = Histogram(
            "pagewire_validation_seconds", "Arrival until a request is known to be valid", buckets=_LATENCY_S,
            registry=registry,
        )  # fmt: skip
        self.queue_s = Histogram(
            "pagewire_router_queue_seconds", "Wait for admission", buckets=_LATENCY_S, registry=registry
        )
        self.ttft_s = Histogram(
            "pagewire_time_to_first_token_seconds", "Arrival to first token", buckets=_LATENCY_S, registry=registry
        )
        self.itl_s = QuickHistogram(_GAP_S)
        gaps = QuickCollector("pagewire_inter_token_latency_seconds", "Gap between tokens of a choice", self.itl_s)
        registry.register(gaps)  # type: ignore[arg-type]
        self.text_s = QuickHistogram(_TEXT_S)
        texts = QuickCollector(
            "pagewire_step_text_seconds", "One step of a worker's batch, made text for clients", self.text_s,
            {"kind": "decode"},
        )  # fmt: skip
        registry.register(texts)  # type: ignore[arg-type]
        self.e2e_s = Histogram("pagewire_e2e_seconds", "Arrival to end", buckets=_LATENCY_S, registry=registry)
        self.inference_s = Histogram(
            "pagewire_inference_seconds", "Admission to end", buckets=_LATENCY_S, registry=registry
        )
        self.token_s = Histogram(
            "pagewire_mean_time_per_token_seconds", "Admission to end, over the tokens of the answer", buckets=_GAP_S,
            registry=registry,
        )  # fmt: skip
        self.prompt_length, self.answer_length, self.longest_answer, self.asked_length, self.asked_choices = (
            Histogram(f"pagewire_request_{name}", text, buckets=buckets, registry=registry)
            for name, text, buckets in (
                ("prompt_tokens", "Prompt tokens of a request", _TOKENS),
                ("generation_tokens", "Tokens that a request was given", _TOKENS),
                ("longest_answer_tokens", "Tokens of the longest answer that a request was given", _TOKENS),
                ("max_tokens", "Tokens that a request asked for at most", _TOKENS),
                ("choices", "Answers that a request asked for", _CHOICES),
            )
        )
        self.finished = Counter("pagewire_finished_choices", "Answers by their end", ["reason"], registry=registry)
        self.prompt_tokens = Counter("pagewire_prompt_tokens", "Prompt tokens of finished requests", registry=registry)
        self.generation_tokens = Counter("pagewire_generation_tokens", "Tokens given to clients", registry=registry)
        self.cached_tokens = Counter(
            "pagewire_cached_tokens", "Prompt tokens whose KV was there already", registry=registry
        )
        self.routes = Counter(
            "pagewire_route", "Attempts by plan: a prefill and a decode worker, or one worker alone", ["decision"],
            registry=registry,
        )  # fmt: skip
        self.retries = Counter("pagewire_retries", "Attempts lost, by the leg that failed", ["leg"], registry=registry)
        self.resumed = Counter(
            "pagewire_resumed_requests",
            "Times that a request outlived its decode worker",
            registry=registry,
        )
        self.running = Gauge("pagewire_running_requests", "Requests admitted and not ended", registry=registry)
        self.queued = Gauge("pagewire_queued_requests", "Requests waiting for admission", registry=registry)
        self.queued_tokens = Gauge(
            "pagewire_queued_prompt_tokens", "Prompt tokens of requests that wait for admission", registry=registry
        )
        self.index_age = Gauge(
            "pagewire_index_age_seconds", "For how long some worker's blocks have been incompletely known",
            registry=registry,
        )  # fmt: skip
        self.index_level = Gauge(
            "pagewire_index_level", "0: follows Redis; 1 to 3: how far it does without", registry=registry
        )
        self.index_gaps = Counter(
            "pagewire_index_gaps", "Times that events were lost, by what mended it", ["mended_by"], registry=registry
        )
        self.expected_hits = Counter(
            "pagewire_expected_hit_tokens", "Prompt tokens that a worker was chosen to have cached", registry=registry
        )
        self.false_hits = Counter(
            "pagewire_false_hit_tokens", "Of these, tokens that it did not have", registry=registry
        )
        self.unexpected_hits = Counter(
            "pagewire_unexpected_hit_tokens", "Prompt tokens that a worker had and was not expected to",
            registry=registry,
        )  # fmt: skip
        self.index_blocks = Gauge("pagewire_index_blocks", "Block hashes in the prefix index", registry=registry)
        self.redis_connected = Gauge("pagewire_redis_connected", "1 while Redis answers", registry=registry)
        self._predicted_s = Histogram(
            "pagewire_predicted_seconds", "Time to first token, and of the KV transfer after it, as predicted",
            ["term", "plan"], buckets=_LATENCY_S, registry=registry,
        )  # fmt: skip
        self._prediction_error_s = Histogram(
            "pagewire_prediction_error_seconds", "What it took less what was predicted",
            ["term", "plan"], buckets=_ERROR_S, registry=registry,
        )  # fmt: skip
        self.circuits_opened = Counter(
            "pagewire_circuits_opened", "Circuit breakers that opened, by leg and kind of error", ["leg", "cause"],
            registry=registry,
        )  # fmt: skip
        self.circuits_open = Gauge("pagewire_circuits_open", "Circuit breakers not closed", ["leg"], registry=registry)
        for counter, values in (
            (self.requests, _OUTCOMES), (self.retries, _LEGS), (self.routes, _PLANS), (self.index_gaps, _MENDED_BY)
        ):  # fmt: skip
            for value in values:
                counter.labels(value)

    def count_finished(self, reason: int) -> None:
        """A choice has ended; reason: a FinishReason."""
        name = common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()  # type: ignore[arg-type]
        self.finished.labels(name).inc()

    def gap_mended(self, how: str) -> None:
        self.index_gaps.labels(how).inc()

    def predicted(self, term: str, plan: str, predicted_s: float, actual_s: float) -> None:
        """What became of a prediction (`ttft` or `transfer`) for a plan (`pair` or `local`)."""
        self._predicted_s.labels(term, plan).observe(predicted_s)
        self._prediction_error_s.labels(term, plan).observe(actual_s - predicted_s)
