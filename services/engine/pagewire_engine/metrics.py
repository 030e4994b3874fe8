"""Prometheus metrics of an engine and of the stages that its requests go through."""

from __future__ import annotations

from collections.abc import Iterator

from pagewire_kernels.cpu.cores import Cores
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pagewire_engine.engine import Engine
from pagewire_engine.speculative.proposer import SpeculativeProposer

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
    "joins": "Steps in which sequences joined others that ran",
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
        yield from self._steps()
        yield from self._kinds_of_steps()
        text = "Tokens that the running sequences may grow to"
        yield GaugeMetricFamily("pagewire_engine_running_max_tokens", text, self._engine.max_running_tokens())
        text = "Tokens whose KV the pool can hold"
        size = self._engine.config.num_blocks * self._engine.config.block_size
        yield GaugeMetricFamily("pagewire_engine_pool_tokens", text, size)
        config, labels = self._engine.config, ["block_size", "num_blocks", "enable_prefix_caching"]
        info = GaugeMetricFamily(
            "pagewire_engine_cache_config_info", "How the KV pool is made; always 1", labels=labels
        )
        info.add_metric([str(getattr(config, label)) for label in labels], 1)
        yield info

    def _steps(self) -> Iterator[Metric]:
        counters = self._engine.counters
        for name, text, histogram in (
            ("step_tokens", "Tokens that a step computed", counters.step_tokens),
            ("admitted_sequences", "Sequences that began with one step", counters.admitted),
            ("join_seconds", "Time to make the batch of a step in which sequences join others", counters.join_s),
            ("accepted_tokens_per_sequence", "Draft tokens that a sequence accepted", counters.accepted_per_sequence),
        ):
            family = HistogramMetricFamily(f"pagewire_engine_{name}", text)
            histogram.add_to(family)
            yield family

    def _kinds_of_steps(self) -> Iterator[Metric]:
        """prefill: of steps with some of a prompt in them."""
        counters, labels = self._engine.counters, ["kind"]
        text = "Time of a step: prefill where some of a prompt is in it, else decode"
        seconds = HistogramMetricFamily("pagewire_engine_step_seconds", text, labels=labels)
        text = "Time to drop what a step ended and to send its tokens"
        publish = HistogramMetricFamily("pagewire_engine_publish_seconds", text, labels=labels)
        lost = CounterMetricFamily("pagewire_engine_lost_steps", "Steps that failed", labels=labels)
        for kind, steps in (("prefill", counters.prefill), ("decode", counters.decode)):
            steps.seconds.add_to(seconds, [kind])
            steps.publish_s.add_to(publish, [kind])
            lost.add_metric([kind], steps.lost)
        yield from (seconds, publish, lost)


class CoreCollector:
    """Reads how often cores were lent when it is scraped."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores

    def collect(self) -> Iterator[Metric]:
        prefix = "pagewire_engine_cores"
        text = "Cores of other workers that steps used, summed over the steps"
        yield CounterMetricFamily(f"{prefix}_borrowed", text, self._cores.borrowed)
        text = "Borrowed cores that were given back in the middle of a step"
        yield CounterMetricFamily(f"{prefix}_returned", text, self._cores.returned)


class SpeculationCollector:
    """Reads what became of the draft tokens when it is scraped. Metrics are named as in vLLM."""

    def __init__(self, engine: Engine, proposer: SpeculativeProposer) -> None:
        self._engine, self._proposer = engine, proposer

    def collect(self) -> Iterator[Metric]:
        prefix, counters = "pagewire_spec_decode", self._engine.counters
        yield CounterMetricFamily(
            f"{prefix}_num_drafts", "Drafts computed, one or more tokens each", counters.num_drafts
        )
        yield CounterMetricFamily(f"{prefix}_num_draft_tokens", "Draft tokens computed", counters.draft_tokens)
        yield CounterMetricFamily(f"{prefix}_num_accepted_tokens", "Draft tokens accepted", counters.accepted_tokens)
        text = "Draft tokens accepted, by position in the draft"
        positions = CounterMetricFamily(f"{prefix}_num_accepted_tokens_per_pos", text, labels=["position"])
        for position, count in enumerate(counters.accepted_per_position):
            positions.add_metric([str(position)], count)
        yield positions
        yield GaugeMetricFamily(
            f"{prefix}_draft_tokens_per_sequence", "Draft tokens per decoding sequence in the latest decode step; "
            "0 while they do not pay", self._proposer.policy.drafts_per_sequence
        )  # fmt: skip
        yield GaugeMetricFamily(
            f"{prefix}_draft_blocks", "KV blocks of the draft model that sequences hold", self._proposer.num_held_blocks
        )
