"""The sequences that decode, as a structure of arrays, so that a step is composed without looking at each."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from pagewire_engine.sampler import SampleRow
from pagewire_engine.sequence import Sequence

_COLUMNS = 8
_T = TypeVar("_T")


class DecodeRows:
    """Rows 0..n-1 are dense: one that leaves is replaced by the last.

    num_queued: of the sequences, those that came through the engine's queue.

    `sequences`, `scheduled` and `sample_rows` have an element per row, every array (int64) at least that:

    seats       row of the engine's block tables
    next_ids    id of the next token to compute; -1 - r: token r of the step that was launched last
    positions   its position, which is also the number of tokens computed once the launched steps are done
    capacities  tokens that the sequence's blocks hold
    limits      tokens at which the sequence ends whatever they are
    last_steps  number of the last launched step that has the row
    needs_host  1 if its next step can only be prepared when the host knows all its tokens
    may_copy    1 until its first step if others hold the half-full block that its next token goes into
    """

    def __init__(self, num_rows: int) -> None:
        self.sequences: list[Sequence] = []
        self.scheduled: list[tuple[Sequence, int]] = []
        self.sample_rows: list[SampleRow] = []
        self.num_queued = 0
        self._use(np.zeros((_COLUMNS, max(num_rows, 1)), np.int64))

    def __len__(self) -> int:
        return len(self.sequences)

    def _use(self, columns: np.ndarray) -> None:
        self._columns = columns
        self.seats, self.next_ids, self.positions, self.capacities = columns[:4]
        self.limits, self.last_steps, self.needs_host, self.may_copy = columns[4:]

    def join(self, seq: Sequence, values: tuple[int, int, int, int, int, int, int, int]) -> None:
        """Gives the sequence a row. values: in the order of the arrays above."""
        assert seq.row < 0
        seq.row = len(self.sequences)
        if seq.row == self._columns.shape[1]:
            self._use(np.concatenate([self._columns, np.zeros_like(self._columns)], 1))
        self._columns[:, seq.row] = values
        self.sequences.append(seq)
        self.num_queued += seq.queued
        self.scheduled.append((seq, 1))
        self.sample_rows.append(seq.request.sample_row(seq.choice, seq.tokens))

    def leave(self, seq: Sequence) -> None:
        """Takes its row away; `seq.last_step` keeps what the row knew."""
        row, last = seq.row, len(self.sequences) - 1
        seq.last_step, seq.row = int(self.last_steps[row]), -1
        self.num_queued -= seq.queued
        if row != last:
            self._columns[:, row] = self._columns[:, last]
            self.sequences[last].row = row
        _replace_by_last(self.sequences, row)
        _replace_by_last(self.scheduled, row)
        _replace_by_last(self.sample_rows, row)

    def ready(self, landed: int) -> np.ndarray:
        """Rows that can be scheduled when the results of steps up to `landed` are known.

        A row in a later step goes on by one token on trust, unless the host must know that token, or the
        sequence ends with it.
        """
        n = len(self.sequences)
        flying = self.last_steps[:n] > landed
        if not flying.any():
            return np.arange(n)
        blind = (self.needs_host[:n] == 0) & (self.positions[:n] + 1 < self.limits[:n])
        return np.flatnonzero(~flying | blind)

    def advance(self, rows: np.ndarray, step: int) -> None:
        """Books that these rows were launched in `step`, as its tokens 0, 1, ... in this order."""
        self.positions[rows] += 1
        self.next_ids[rows] = -1 - np.arange(len(rows))
        self.last_steps[rows] = step
        self.may_copy[rows] = 0

    def resolve(self, rows: list[int], tokens: list[int], landed: int) -> None:
        """Tells rows (or -1: no more) the tokens that step `landed` gave them, unless a later step already has them."""
        index, ids = np.array(rows, np.int64), np.array(tokens, np.int64)
        known = (index >= 0) & (self.last_steps[index] <= landed)
        self.next_ids[index[known]] = ids[known]


def _replace_by_last(values: list[_T], index: int) -> None:
    values[index] = values[-1]
    values.pop()
