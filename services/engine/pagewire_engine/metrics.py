"""Prometheus metrics of an engine and of the stages that its requests go through."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from pagewire_engine.engine import Engine

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES = {
    "free_blocks": "KV blocks that can be given to a request",
    "total_blocks": "KV blocks in the pool",
    "reserved_blocks": "KV blocks promised to transfers, pages not yet bound",
    "num_running": "Sequences in the running batch",
    "num_waiting": "Sequences waiting for a place",
    "running_kv_tokens": "Tokens whose KV the running sequences hold",
}
_COUNTERS = {
    "prompt_tokens_computed": "Prompt tokens whose KV was computed here",
    "prompt_tokens_cached": "Prompt tokens found in the prefix cache",
    "tokens_sampled": "Tokens chosen here",
    "preemptions": "Sequences that gave their blocks back and were computed anew",
    "steps": "Engine steps",
}

STAGES = ("queue", "prefill", "kv_tail", "decode")


class StageMetrics:
    """Seconds per request in each stage, as this worker measures them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "pagewire_stage_seconds", "Time of a request in one stage", ["stage"], buckets=_BUCKETS, registry=registry
        )

    def observe(self, **seconds: float) -> None:
        for stage, value in seconds.items():
            assert stage in STAGES
            self._seconds.labels(stage).observe(value)


class EngineCollector:
    """Reads the engine's counters when it is scraped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"pagewire_engine_{name}", text, load[name])
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"pagewire_engine_{name}", text, getattr(self._engine.counters, name))
