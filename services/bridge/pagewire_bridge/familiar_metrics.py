"""pagewire's metrics once more under the names that vLLM and TGI gave theirs, so that existing dashboards work.

What has no meaning here is left out: LoRA, and the time to decode a batch's text, which the router does token by token.
A sample of vLLM's has the labels `model_name` and `engine`, the process that counted; TGI's have none, and are sums.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric

Labels = Mapping[str, str]


@dataclass(frozen=True)
class _Name:
    """One of theirs. ours: the families that it adds up, of which only the samples that `where` allows.

    keep: labels of ours that stay, with their name of it.
    """

    theirs: str
    ours: tuple[str, ...]
    where: Callable[[Labels], bool] = lambda labels: True
    keep: Labels = field(default_factory=dict)


def _is(name: str, value: str) -> Callable[[Labels], bool]:
    return lambda labels: labels.get(name) == value


_WAITING = ("pagewire_queued_requests", "pagewire_engine_num_waiting")
_RUNNING = ("pagewire_engine_num_running",)
_LOOKED_UP = ("pagewire_engine_prompt_tokens_computed", "pagewire_engine_prompt_tokens_cached")
_TTFT, _E2E = ("pagewire_time_to_first_token_seconds",), ("pagewire_e2e_seconds",)
_ITL, _QUEUE = ("pagewire_inter_token_latency_seconds",), ("pagewire_router_queue_seconds",)
_INFERENCE, _STAGE = ("pagewire_inference_seconds",), ("pagewire_stage_seconds",)
_PROMPT, _ANSWER = ("pagewire_request_prompt_tokens",), ("pagewire_request_generation_tokens",)
_LONGEST, _STEP_S = ("pagewire_request_longest_answer_tokens",), ("pagewire_engine_step_seconds",)
_ASKED, _REQUESTS = ("pagewire_request_max_tokens",), ("pagewire_requests",)
_LOST = "pagewire_engine_lost_steps"

VLLM = (
    _Name("num_requests_running", _RUNNING),
    _Name("num_requests_waiting", _WAITING),
    _Name("prefix_cache_queries", _LOOKED_UP),
    _Name("prefix_cache_hits", _LOOKED_UP[1:]),
    _Name("prompt_tokens", ("pagewire_prompt_tokens",)),
    _Name("generation_tokens", ("pagewire_generation_tokens",)),
    _Name("num_preemptions", ("pagewire_engine_preemptions",)),
    _Name("request_success", ("pagewire_finished_choices",), keep={"reason": "finished_reason"}),
    _Name("time_to_first_token_seconds", _TTFT),
    _Name("inter_token_latency_seconds", _ITL),
    _Name("time_per_output_token_seconds", _ITL),  # its older name, in most dashboards
    _Name("e2e_request_latency_seconds", _E2E),
    _Name("request_queue_time_seconds", _QUEUE),
    _Name("request_inference_time_seconds", _INFERENCE),
    _Name("request_prefill_time_seconds", _STAGE, _is("stage", "prefill")),
    _Name("request_decode_time_seconds", _STAGE, _is("stage", "decode")),
    _Name("request_prompt_tokens", _PROMPT),
    _Name("request_generation_tokens", _ANSWER),
    _Name("request_max_num_generation_tokens", _LONGEST),
    _Name("request_params_max_tokens", _ASKED),
    _Name("request_params_n", ("pagewire_request_choices",)),
    _Name("iteration_tokens_total", ("pagewire_engine_step_tokens",)),
    _Name("cache_config_info", ("pagewire_engine_cache_config_info",), keep={
        "block_size": "block_size", "num_blocks": "num_gpu_blocks", "enable_prefix_caching": "enable_prefix_caching"}),
    _Name("spec_decode_num_drafts", ("pagewire_spec_decode_num_drafts",)),
    _Name("spec_decode_num_draft_tokens", ("pagewire_spec_decode_num_draft_tokens",)),
    _Name("spec_decode_num_accepted_tokens", ("pagewire_spec_decode_num_accepted_tokens",)),
    _Name("spec_decode_num_accepted_tokens_per_pos", ("pagewire_spec_decode_num_accepted_tokens_per_pos",),
          keep={"position": "position"}),
)  # fmt: skip
TGI = (
    _Name("request_count", _REQUESTS),
    _Name("request_success", _REQUESTS, _is("outcome", "ok")),
    _Name("request_failure", _REQUESTS, lambda labels: labels["outcome"] != "ok", keep={"outcome": "err"}),
    _Name("request_duration", _E2E),
    _Name("request_validation_duration", ("pagewire_validation_seconds",)),
    _Name("request_queue_duration", _QUEUE),
    _Name("request_inference_duration", _INFERENCE),
    _Name("request_mean_time_per_token_duration", ("pagewire_mean_time_per_token_seconds",)),
    _Name("request_input_length", _PROMPT),
    _Name("request_generated_tokens", _ANSWER),
    _Name("request_max_new_tokens", _ASKED),
    _Name("request_skipped_tokens", ("pagewire_engine_accepted_tokens_per_sequence",)),
    _Name("queue_size", _WAITING),
    _Name("batch_current_size", _RUNNING),
    _Name("batch_current_max_tokens", ("pagewire_engine_running_max_tokens",)),
    _Name("batch_total_tokens", ("pagewire_engine_running_kv_tokens",)),
    _Name("batch_max_total_tokens", ("pagewire_engine_pool_tokens",)),
    _Name("batch_next_size", ("pagewire_engine_admitted_sequences",)),
    _Name("batch_inference_duration", _STEP_S, keep={"kind": "method"}),
    _Name("batch_forward_duration", _STEP_S, keep={"kind": "method"}),
    _Name("batch_decode_duration", ("pagewire_step_text_seconds",), keep={"kind": "method"}),
    _Name("batch_filter_duration", ("pagewire_engine_publish_seconds",), keep={"kind": "method"}),
    _Name("batch_inference_failure", (_LOST,), keep={"kind": "method"}),
    _Name("batch_concat", ("pagewire_engine_joins",)),
    _Name("batch_concat_duration", ("pagewire_engine_join_seconds",)),
)


def familiar(families: Mapping[str, Metric], model: str) -> Iterator[Metric]:
    """families: ours, by name, with the label `instance` on every sample."""
    for name in VLLM:
        yield from _renamed(families, name, "vllm:", lambda labels: _vllm_labels(labels, model))
    yield from _kv_usage(families, model)
    for name in TGI:
        yield from _renamed(families, name, "tgi_", lambda labels: {})
    yield from _batch_count(families)


def _vllm_labels(labels: Labels, model: str) -> dict[str, str]:
    return {"model_name": model, "engine": labels["instance"]}


def _renamed(
    families: Mapping[str, Metric], name: _Name, prefix: str, to_labels: Callable[[Labels], dict[str, str]]
) -> Iterator[Metric]:
    """Nothing while ours is not there: a gauge of 0 would say that nobody waits."""
    ours = [families[family] for family in name.ours if family in families]
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for family in ours:
        for sample in family.samples:
            if name.where(sample.labels):
                kept = {theirs: sample.labels[own] for own, theirs in name.keep.items()}
                kept |= {"le": sample.labels["le"]} if "le" in sample.labels else {}
                suffix = sample.name.removeprefix(family.name)
                sums[suffix, tuple((to_labels(sample.labels) | kept).items())] += sample.value
    if not sums:
        return
    # TGI's counters do not end in _total, as this type's would have to.
    is_bare = prefix == "tgi_" and ours[0].type == "counter"
    metric = Metric(prefix + name.theirs, ours[0].documentation, "unknown" if is_bare else ours[0].type)
    for (suffix, labels), value in sums.items():
        metric.add_sample(metric.name + ("" if is_bare else suffix), dict(labels), value)
    yield metric


def _kv_usage(families: Mapping[str, Metric], model: str) -> Iterator[Metric]:
    free, total = (families.get(f"pagewire_engine_{name}_blocks") for name in ("free", "total"))
    if free is None or total is None:
        return
    blocks = {sample.labels["instance"]: sample.value for sample in total.samples}
    metric = Metric("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 1 being all", "gauge")
    for sample in free.samples:
        used = 1 - sample.value / max(blocks.get(sample.labels["instance"], 0), 1)
        metric.add_sample(metric.name, _vllm_labels(sample.labels, model), used)
    yield metric


def _batch_count(families: Mapping[str, Metric]) -> Iterator[Metric]:
    """Steps by what was in them, all and those that were not lost."""
    if steps := families.get(_STEP_S[0]):
        counts = _by_kind(steps, "_count")
        lost = _by_kind(families[_LOST], "_total") if _LOST in families else Counter[str]()
        for name, total in (("count", counts), ("success", counts - lost)):
            metric = Metric(f"tgi_batch_inference_{name}", "Steps by what was in them", "unknown")
            for method in counts:
                metric.add_sample(metric.name, {"method": method}, total[method])
            yield metric


def _by_kind(family: Metric, suffix: str) -> Counter[str]:
    counts = Counter[str]()
    for sample in family.samples:
        if sample.name.endswith(suffix):
            counts[sample.labels["kind"]] += int(sample.value)
    return counts
