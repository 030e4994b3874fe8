"""Batches written by hand, for tests of a runner alone: sequences with fixed blocks and whatever rows a test wants."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pagewire_engine.batch import Batch
from pagewire_engine.sampler import SampleRow
from pagewire_engine.sampling_params import SamplingParams

BLOCK = 16
GREEDY = SamplingParams(temperature=0.0)


@dataclass(eq=False)
class Scripted:
    """A sequence in a seat of its own."""

    seat: int
    tokens: list[int]
    blocks: list[int]
    params: SamplingParams = GREEDY
    num_computed: int = 0


@dataclass
class Script:
    """Hands out blocks in an order that is not the natural one, and builds batches."""

    num_blocks: int = 64
    max_blocks: int = 16
    seats: int = 12
    sequences: list[Scripted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(np.random.default_rng(0).permutation(self.num_blocks))
        self.tables = np.zeros((self.seats, self.max_blocks), np.int32)
        self._changed: set[int] = set()

    def add(self, tokens: Seq[int], **params: Any) -> Scripted:
        seq = Scripted(len(self.sequences), list(tokens), [], SamplingParams(**({"temperature": 0.0} | params)))
        self.sequences.append(seq)
        return seq

    def batch(self, *rows: tuple[Scripted, int], unknown: dict[Scripted, int] | None = None) -> Batch:
        """`rows` in batch order: sequences and how many tokens each computes; those that reach their end sample.

        unknown: sequences whose last token is token r of the batch before. Their tokens still lack it.
        """
        unknown = unknown or {}
        ids: list[int] = []
        positions: list[int] = []
        starts, sample_from, sample_rows = [0], [], []
        for seq, count in rows:
            begin, end = seq.num_computed, seq.num_computed + count
            self.bind(seq, end)
            known = [*seq.tokens, *([-1 - unknown[seq]] if seq in unknown else [])]
            ids += known[begin:end]
            positions += range(begin, end)
            starts.append(len(ids))
            if end == len(known):
                sample_from.append(len(ids) - 1)
                sample_rows.append(SampleRow(seq.params, 0, seq.tokens, 1))
            seq.num_computed = end
        changed, self._changed = tuple(self._changed), set()
        return Batch(
            scheduled=(),  # runners read the arrays
            input_ids=np.array(ids, np.int32),
            positions=np.array(positions, np.int32),
            query_start=np.array(starts, np.int32),
            seq_lens=np.array([seq.num_computed for seq, _ in rows], np.int32),
            num_decode=next((i for i, (_, count) in enumerate(rows) if count > 1), len(rows)),
            tables=self.tables,
            seats=np.array([seq.seat for seq, _ in rows], np.int32),
            table_changes=changed,
            sample_from=np.array(sample_from, np.int32),
            sample_rows=tuple(sample_rows),
            copies=(),
        )

    def bind(self, seq: Scripted, num_tokens: int) -> None:
        """Gives it blocks for so many tokens; the next batch tells of them."""
        while len(seq.blocks) * BLOCK < num_tokens:
            seq.blocks.append(int(self._free.pop()))
            self.tables[seq.seat, len(seq.blocks) - 1] = seq.blocks[-1]
            self._changed.add(seq.seat)
