"""Outcomes to numbers, and numbers to a table."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from pagewire_bench.client import Outcome

_LATENCIES = {"ttft_ms": "TTFT (ms)", "itl_ms": "ITL (ms)", "e2e_ms": "E2E (ms)"}


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles (linear between neighbours); empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    mean = sum(ordered) / len(ordered)
    return {"mean": mean, "p50": percentile(0.5), "p90": percentile(0.9), "p99": percentile(0.99)}


def summarise(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """Latencies are those of requests that ended well; throughput is over all of the wall time."""
    good = [outcome for outcome in outcomes if not outcome.error]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in good)
    output_tokens = sum(outcome.completion_tokens for outcome in good)
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
        "ttft_ms": distribution([1000 * outcome.ttft_s for outcome in good]),
        "itl_ms": distribution([1000 * gap for outcome in good for gap in outcome.itl_s]),
        "e2e_ms": distribution([1000 * outcome.e2e_s for outcome in good]),
    }


def transfer(before: str | None, after: str | None, outcomes: Iterable[Outcome]) -> dict[str, float] | None:
    """What pagewire's /metrics say about KV that crossed between two scrapes; None for other servers.

    `share_of_ttft` is transfer time over the time to first token, both summed over requests. The first
    token does not wait for the transfer, so it may exceed what a client could gain.
    """
    if not before or not after or "pagewire_kv_transfer" not in after:
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


def print_table(title: str, results: dict[str, Any]) -> None:
    table = Table()
    table.add_column("")
    for column in ("mean", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    for key, label in _LATENCIES.items():
        table.add_row(label, *(f"{value:.2f}" for value in results[key].values()))
    console = Console()
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
    for line in _sentences(results):
        console.print(line, highlight=False, soft_wrap=True)


def _sentences(results: dict[str, Any]) -> list[str]:
    lines = [
        f"{results['completed']} requests in {results['wall_s']:.1f} s: {results['requests_per_s']:.2f} requests/s, "
        f"{results['output_tokens_per_s']:.1f} output tokens/s, {results['total_tokens_per_s']:.1f} tokens/s in all",
        f"{results['prompt_tokens']} prompt tokens, {results['cached_tokens_share']:.1%} of them cached; "
        f"{results['output_tokens']} output tokens",
    ]
    moved = results["transfer"]
    if moved is not None:
        lines.append(
            f"{moved['transfers']:.0f} KV transfers, {moved['bytes'] / 1e6:.2f} MB at {moved['mb_per_s']:.1f} MB/s; "
            f"their time is {moved['share_of_ttft']:.1%} of the TTFT"
        )
    if results["errors"]:
        lines.append("errors: " + ", ".join(f"{count} x {error}" for error, count in results["errors"].items()))
    return lines
