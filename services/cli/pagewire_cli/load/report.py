"""Outcomes to numbers, and numbers to the table that `vllm bench serve` prints."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pagewire_cli.load.client import Outcome

_HEADINGS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
_WIDTH = 50


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    mean = sum(ordered) / len(ordered)
    return {"mean": mean} | {f"p{share}": percentile(ordered, share / 100) for share in (50, 90, 99)}


def milliseconds(outcomes: Iterable[Outcome]) -> dict[str, list[float]]:
    """Every value of each metric, of requests that ended well."""
    good = [outcome for outcome in outcomes if not outcome.error]
    return {
        "ttft": [1000 * outcome.ttft_s for outcome in good],
        "tpot": [1000 * outcome.tpot_s for outcome in good if outcome.tpot_s is not None],
        "itl": [1000 * gap for outcome in good for gap in outcome.itl_s],
        "e2el": [1000 * outcome.e2e_s for outcome in good],
    }


def summarise(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """Latencies are those of requests that ended well; throughput is over all of the wall time."""
    good = [outcome for outcome in outcomes if not outcome.error]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in good)
    output_tokens = sum(outcome.completion_tokens for outcome in good)
    values = milliseconds(outcomes)
    return {
        "completed": len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "wall_s": wall_s,
        "requests_per_s": len(good) / wall_s,
        "output_tokens_per_s": output_tokens / wall_s,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / wall_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "cached_tokens_share": sum(outcome.cached_tokens for outcome in good) / prompt_tokens if prompt_tokens else 0.0,
        "ttft_ms": distribution(values["ttft"]),
        "itl_ms": distribution(values["itl"]),
        "e2e_ms": distribution(values["e2el"]),
    }


def as_vllm(outcomes: Sequence[Outcome], wall_s: float, percentiles: Sequence[float]) -> dict[str, Any]:
    """The same under the names of `vllm bench serve --save-result`, with its latencies."""
    facts = summarise(outcomes, wall_s)
    result = {
        "duration": wall_s,
        "completed": facts["completed"],
        "failed": len(outcomes) - facts["completed"],
        "total_input_tokens": facts["prompt_tokens"],
        "total_output_tokens": facts["output_tokens"],
        "request_throughput": facts["requests_per_s"],
        "output_throughput": facts["output_tokens_per_s"],
        "total_token_throughput": facts["total_tokens_per_s"],
        "cached_tokens_share": facts["cached_tokens_share"],
        "error_counts": facts["errors"],
    }
    for metric, values in milliseconds(outcomes).items():
        ordered = sorted(values) or [0.0]
        result[f"mean_{metric}_ms"] = mean = sum(ordered) / len(ordered)
        result[f"median_{metric}_ms"] = percentile(ordered, 0.5)
        result[f"std_{metric}_ms"] = (sum((value - mean) ** 2 for value in ordered) / len(ordered)) ** 0.5
        for share in percentiles:
            result[f"p{share:g}_{metric}_ms"] = percentile(ordered, share / 100)
    return result


def goodput(outcomes: Sequence[Outcome], wall_s: float, targets_ms: Mapping[str, float]) -> float:
    """Requests per second that kept every target."""
    named = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}
    good = [
        outcome
        for outcome in outcomes
        if not outcome.error
        and all(1000 * (getattr(outcome, named[name]) or 0.0) <= most for name, most in targets_ms.items())
    ]
    return len(good) / wall_s


def table(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> Iterable[str]:
    """The lines of the table."""
    yield " Serving Benchmark Result ".center(_WIDTH, "=")
    yield from _lines(result)
    for metric in metrics:
        short, heading = _HEADINGS[metric]
        yield heading.center(_WIDTH, "-")
        rows = [("Mean", "mean"), ("Median", "median"), *((f"P{share:g}", f"p{share:g}") for share in percentiles)]
        for label, key in rows:
            yield _row(f"{label} {short} (ms):", f"{result[f'{key}_{metric}_ms']:.2f}")
    yield "=" * _WIDTH


def _lines(result: Mapping[str, Any]) -> Iterable[str]:
    yield _row("Successful requests:", result["completed"])
    yield _row("Failed requests:", result["failed"])
    if result["max_concurrency"]:
        yield _row("Maximum request concurrency:", result["max_concurrency"])
    if result["request_rate"] != "inf":
        yield _row("Request rate configured (RPS):", f"{result['request_rate']:.2f}")
    yield _row("Benchmark duration (s):", f"{result['duration']:.2f}")
    yield _row("Total input tokens:", result["total_input_tokens"])
    yield _row("Total generated tokens:", result["total_output_tokens"])
    yield _row("Request throughput (req/s):", f"{result['request_throughput']:.2f}")
    if result["request_goodput"] is not None:
        yield _row("Request goodput (req/s):", f"{result['request_goodput']:.2f}")
    yield _row("Output token throughput (tok/s):", f"{result['output_throughput']:.2f}")
    yield _row("Total Token throughput (tok/s):", f"{result['total_token_throughput']:.2f}")
    yield _row("Input tokens from a cache (%):", f"{100 * result['cached_tokens_share']:.2f}")
    moved = result["kv_transfer"]
    if moved:
        yield _row("KV moved between workers (MB):", f"{moved['bytes'] / 1e6:.2f}")
        yield _row("KV transfer rate (MB/s):", f"{moved['mb_per_s']:.2f}")


def _row(label: str, value: object) -> str:
    return f"{label:<40} {value:<10}"


def transfer(before: str, after: str, outcomes: Iterable[Outcome]) -> dict[str, float] | None:
    """What pagewire's /metrics say about KV that crossed between two scrapes; None for other servers.

    `share_of_ttft` is transfer time over the time to first token, both summed over requests. The first
    token does not wait for the transfer, so it may exceed what a client could gain.
    """
    if "pagewire_kv_transfer" not in after:
        return None
    sent, seconds, count = (
        _sample(after, name) - _sample(before, name)
        for name in (
            "pagewire_kv_transfer_bytes_total",
            "pagewire_kv_transfer_seconds_sum",
            "pagewire_kv_transfer_seconds_count",
        )
    )
    ttft_s = sum(outcome.ttft_s for outcome in outcomes if not outcome.error)
    return {
        "transfers": count,
        "bytes": sent,
        "seconds": seconds,
        "mb_per_s": sent / seconds / 1e6 if seconds else 0.0,
        "share_of_ttft": seconds / ttft_s if ttft_s else 0.0,
    }


def _sample(text: str, name: str) -> float:
    """The sum over all label sets, but for bytes only what was sent: each byte is counted at both ends."""
    from prometheus_client.parser import text_string_to_metric_families

    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels.get("direction", "sent") == "sent"
    )


def machine() -> dict[str, Any]:
    """The machine that the load came from."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {"cpu": cpu, "cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
