"""Milliseconds of a step with and without drafts, and of drafting, fitted to the steps themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

_KEEP = 0.98  # what is known fades with every step, seen or not: half of it in 35 steps
_LEAST_WEIGHT = 0.5  # but not below half a measurement
_LEAST_SLOPE = 0.05  # of y / x: noise must not make rows look free
_OUTLIER = 3.0  # a step that took longer than so many times the expected tells of the machine
_ENOUGH = 4  # steps of a kind after which something is known of it

Counts = np.ndarray[Any, np.dtype[np.int64]]
Milliseconds = np.ndarray[Any, np.dtype[np.float64]]


class FadingLine:
    """y = base + slope * x by least squares, neither negative, old measurements weighing less."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self.num_samples = 0
        self.base = self.slope = 0.0

    def fade(self) -> None:
        if self._n * _KEEP >= _LEAST_WEIGHT:
            self._n, self._x, self._y = self._n * _KEEP, self._x * _KEEP, self._y * _KEEP
            self._xx, self._xy = self._xx * _KEEP, self._xy * _KEEP

    def add(self, x: float, y: float) -> None:
        self.num_samples += 1
        self._n, self._x, self._y = self._n + 1, self._x + x, self._y + y
        self._xx, self._xy = self._xx + x * x, self._xy + x * y
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        if variance < 1e-3 * mean_x**2:  # one size, nearly: all of it is slope
            self.base, self.slope = 0.0, mean_y / mean_x
            return
        through_zero = mean_y / mean_x
        slope = (self._xy / self._n - mean_x * mean_y) / variance
        self.slope = min(max(slope, _LEAST_SLOPE * through_zero), through_zero)
        self.base = mean_y - self.slope * mean_x


class StepTimes:
    """
    step      plain(sequences) + extra(draft rows)     a row may be nearly free (GPU) or cost like any (CPU)
    drafting  per iteration: base + slope * sequences
    """

    def __init__(self) -> None:
        self._plain, self._extra, self._drafting = FadingLine(), FadingLine(), FadingLine()

    @property
    def knows_plain(self) -> bool:
        return self._plain.num_samples >= _ENOUGH

    @property
    def knows_extra(self) -> bool:
        return self._extra.num_samples >= _ENOUGH

    def add_step(self, num_sequences: int, num_drafts: int, milliseconds: float) -> None:
        """A step of decoding sequences alone, `num_drafts` draft rows among its rows."""
        for line in (self._plain, self._extra, self._drafting):
            line.fade()
        plain_ms = self.plain(num_sequences)
        if not num_drafts:
            limit = _OUTLIER * plain_ms if self.knows_plain else milliseconds
            self._plain.add(num_sequences, min(milliseconds, limit))
            return
        limit = _OUTLIER * (plain_ms + float(self.extra(np.array([num_drafts]))[0]))
        self._extra.add(num_drafts, max(min(milliseconds, limit) - plain_ms, 0.0))

    def add_drafting(self, num_sequences: int, num_iterations: int, milliseconds: float) -> None:
        """`num_iterations` steps of the draft model, catching up with the tokens included."""
        self._drafting.add(num_sequences, milliseconds / num_iterations)

    def plain(self, num_sequences: int) -> float:
        return self._plain.base + self._plain.slope * num_sequences

    @property
    def row_ms(self) -> float:
        """What one more draft row costs."""
        return self._extra.slope

    def extra(self, rows: Counts) -> Milliseconds:
        """What so many draft rows add to a step; none adds nothing."""
        return np.where(rows > 0, self._extra.base + self._extra.slope * rows, 0.0)

    def drafting(self, num_sequences: Counts) -> Milliseconds:
        """An iteration of the draft model over so many sequences; none takes no time."""
        return np.where(num_sequences > 0, self._drafting.base + self._drafting.slope * num_sequences, 0.0)
