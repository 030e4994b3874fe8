"""How many draft tokens each sequence gets in a step: as many as make the batch faster, often none.

With acceptance rate p, the i-th draft of a sequence is worth p^i tokens. A step of B sequences with
draft rows R gives B + sum p^i tokens in the time that StepTimes predicts; the choice maximises tokens per
millisecond over the longest draft allowed, dropping the rows that are worth less than their own time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagewire_engine.speculative.step_times import Counts, StepTimes

_GAIN = 1.02  # speculation must promise this much; below, noise would turn it on and off
_PROBE = 4  # steps of the other kind in a row, which bring its times up to date
_PROBE_EVERY = 160  # steps of one kind between probes
_PROBE_SELDOM = 640  # where probes keep saying no

Rates = np.ndarray[Any, np.dtype[np.float64]]


class Policy:
    """disable_by_batch_size: more sequences than that are never given drafts."""

    def __init__(self, disable_by_batch_size: int | None = None) -> None:
        self._most_sequences = disable_by_batch_size
        self.restart()

    def restart(self) -> None:
        """Forgets all that was measured: the first steps of a process are not like those to come."""
        self.times = StepTimes()
        self._since_plain = self._since_drafts = 0
        self._probe_left = 0  # steps of the present probe
        self._probe_drafts = False  # its kind
        self._drafts_every = _PROBE_EVERY
        self.drafts_per_sequence = 0.0  # in the latest step, for metrics

    def observe(self, num_sequences: int, num_drafts: int, milliseconds: float) -> None:
        """A step that decoded, and nothing else, has been measured."""
        self.times.add_step(num_sequences, num_drafts, milliseconds)
        self._since_plain = self._since_plain + 1 if num_drafts else 0
        self._since_drafts = 0 if num_drafts else self._since_drafts + 1
        self.drafts_per_sequence = num_drafts / num_sequences

    def choose(self, num_sequences: int, rates: Rates, limits: Counts) -> Counts:
        """Draft tokens for each sequence that may have some, at most `limits` each (1 or more).

        num_sequences: all that decode in the step, these included.
        """
        none = np.zeros_like(limits)
        if self._most_sequences is not None and num_sequences > self._most_sequences:
            return none
        if not self.times.knows_plain:
            return none
        if not self.times.knows_extra:
            return limits
        if self._is_probe():
            return limits if self._probe_drafts else none
        chosen = self._best(num_sequences, rates, limits)
        if chosen.any():
            self._drafts_every = _PROBE_EVERY
        return chosen

    def _is_probe(self) -> bool:
        """Whether the step is spent on keeping the other kind's times up to date."""
        if not self._probe_left:
            if self._since_plain >= _PROBE_EVERY:
                self._probe_drafts = False
            elif self._since_drafts >= self._drafts_every:
                self._probe_drafts = True
                self._drafts_every = min(2 * self._drafts_every, _PROBE_SELDOM)
            else:
                return False
            self._probe_left = _PROBE
        self._probe_left -= 1
        return True

    def _best(self, num_sequences: int, rates: Rates, limits: Counts) -> Counts:
        lengths = np.arange(1, int(limits.max()) + 1)
        gains = rates[:, None] ** lengths
        possible = lengths <= limits[:, None]
        plain_ms = self.times.plain(num_sequences)
        needed = _GAIN * num_sequences / max(plain_ms, 1e-9)
        speed = needed
        chosen = np.zeros_like(limits)
        for _ in range(2):  # the second time with the speed that the first choice promises
            worth = possible & (gains > speed * self.times.row_ms)
            tokens = num_sequences + (gains * worth).sum(0).cumsum()
            ms = plain_ms + self.times.extra(worth.sum(0).cumsum()) + self.times.drafting(worth.sum(0)).cumsum()
            best = int((tokens / ms).argmax())
            speed = float(tokens[best] / ms[best])
            if speed <= needed:
                return np.zeros_like(limits)
            chosen = worth[:, : best + 1].sum(1)
        return chosen
