"""Figures of several servers over several rounds: medians, spread, and ours against the best of the others.

A ratio is taken within a round, whose parts are near each other in time, and above 1 is always better for pagewire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

from rich.table import Table

Rounds = Sequence[Mapping[str, Any]]  # what one server did under one load
Results = Mapping[str, Mapping[str, Rounds]]  # by server, by load


@dataclass(frozen=True)
class Figure:
    title: str
    path: tuple[str, ...]
    higher_is_better: bool = False
    of_prompts: bool = False  # it means something for answers of one token, too

    def of(self, rounds: Rounds) -> list[float]:
        """One value a round; none at all if any request of any round failed."""
        if not rounds or any(result["errors"] for result in rounds):
            return []
        return [_at(result, self.path) for result in rounds]


FIGURES = (
    Figure("output tokens/s", ("output_tokens_per_s",), higher_is_better=True),
    Figure("TTFT p50 (ms)", ("ttft_ms", "p50"), of_prompts=True),
    Figure("ITL p50 (ms)", ("itl_ms", "p50")),
    Figure("ITL p99 (ms)", ("itl_ms", "p99")),
)


def gains(ours: Sequence[float], theirs: Sequence[float], higher_is_better: bool) -> list[float]:
    """How many times better ours is, round by round; infinite over nothing."""
    pairs = zip(ours, theirs, strict=True) if higher_is_better else zip(theirs, ours, strict=True)
    return [over / under if under else inf for over, under in pairs]


def best(values: Mapping[str, Sequence[float]], higher_is_better: bool) -> str | None:
    """The name with the best median, of those that have values."""
    medians = {name: median(rounds) for name, rounds in values.items() if rounds}
    if not medians:
        return None
    return max(medians, key=medians.__getitem__) if higher_is_better else min(medians, key=medians.__getitem__)


def spread(values: Sequence[float], digits: int) -> str:
    """'median (least-most)'; 'failed' for no values."""
    if not values:
        return "failed"
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"


def table(title: str, figure: Figure, results: Results, loads: Sequence[str], ours: Sequence[str]) -> Table:
    """A row for each load: every server's figure, then each of `ours` over the best of the others."""
    drawn = Table(title=f"{title}: {figure.title}")
    for column in ("", *results, *(f"{name} ÷ best" for name in ours)):
        drawn.add_column(column, justify="right" if column else "left")
    for load in loads:
        values = {server: figure.of(by_load.get(load, ())) for server, by_load in results.items()}
        peer = best({name: rounds for name, rounds in values.items() if name not in ours}, figure.higher_is_better)
        cells = [spread(rounds, 1) for rounds in values.values()]
        drawn.add_row(load, *cells, *(_ratio(values[name], values.get(peer or "", []), figure, peer) for name in ours))
    return drawn


def _ratio(ours: Sequence[float], theirs: Sequence[float], figure: Figure, peer: str | None) -> str:
    if not ours or not theirs:
        return "-"
    return f"{spread(gains(ours, theirs, figure.higher_is_better), 2)} {peer}"


def _at(result: Mapping[str, Any], path: tuple[str, ...]) -> float:
    value: Any = result
    for key in path:
        value = value[key]
    return float(value)
