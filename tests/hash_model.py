"""A model whose answers need no weights: the next token is a hash of what the KV pool says the context is.

Its pool holds the token of every slot, free blocks hold poison, and its attention reads the context through
the block table. So whatever the engine's bookkeeping does wrong (a stale block, a wrong position, a lost
copy) changes the tokens, and `expected` says what they must be, without an engine.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from pagewire_engine.batch import Batch
from pagewire_engine.sampler import Sampled, SampleRow, uniform
from pagewire_engine.sampling_params import SamplingParams

POISON = -7
VOCABULARY = 50


class TokenPool:
    """[num_blocks, block_size] tokens; told what is used and what becomes free, as a KVCache is."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.tokens = np.full((num_blocks, block_size), POISON)

    def allocated(self, blocks: Sequence[int]) -> None:
        assert np.all(self.tokens[list(blocks)] == POISON)

    def freed(self, blocks: Sequence[int]) -> None:
        self.tokens[list(blocks)] = POISON


def next_token(context: Sequence[int], row: SampleRow, num_tokens: int) -> int:
    """A function of the context, the draw for its place and, where penalties look at them, the tokens so far."""
    p = row.params
    draw = uniform(p.seed, row.choice, num_tokens) if p.temperature > 0 else 0.0
    seen = list(row.tokens) if p.needs_host_tokens else None
    return zlib.crc32(repr((list(context), draw, seen)).encode()) % VOCABULARY


def expected(prompt: Sequence[int], params: SamplingParams, choice: int, max_model_len: int) -> list[int]:
    """The tokens of one choice."""
    tokens = list(prompt)
    while len(tokens) < max_model_len:
        row = SampleRow(params, choice, list(tokens), len(prompt))
        tokens.append(next_token(tokens, row, len(tokens)))
        if params.finish(tokens[-1], len(tokens) - len(prompt)):
            break
    return tokens[len(prompt) :]


@dataclass
class Step:
    """Computes when its tokens are asked for, as late as a device might."""

    runner: HashRunner
    batch: Batch
    before: Step | None
    sampled: list[Sampled] = field(default_factory=list)

    def tokens(self) -> list[Sampled]:
        self.sampled = self.runner.compute(self.batch, self.before.sampled if self.before else [])
        self.before = None
        return self.sampled


class HashRunner:
    """A Runner. With `overlaps`, nothing is computed before a step's tokens are asked for."""

    config: Any = None

    def __init__(self, num_blocks: int, block_size: int, *, overlaps: bool = False) -> None:
        self.cache: Any = TokenPool(num_blocks, block_size)
        self.overlaps = overlaps
        self.batches: list[Batch] = []
        self.during: list[Callable[[], None]] = []  # what others do while the next step is being launched
        self._last: Step | None = None
        self._tables = np.zeros((0, 0), np.int32)

    def launch(self, batch: Batch) -> Step:
        while self.during:
            self.during.pop()()
        self._follow(batch)
        seen = tuple(replace(row, tokens=list(row.tokens)) for row in batch.sample_rows)  # what is known by now
        batch = replace(batch, tables=self._tables.copy(), sample_rows=seen)
        self.batches.append(batch)
        step = self._last = Step(self, batch, self._last)
        if not self.overlaps:
            step.tokens()
            return _Done(self, batch, None, step.sampled)
        return step

    def rest(self) -> None:
        pass

    def _follow(self, batch: Batch) -> None:
        """Keeps its own copy of the tables by the changes it is told of, as a device would."""
        assert batch.tables.flags.c_contiguous and batch.tables.dtype == np.int32
        if len(self._tables) != len(batch.tables):
            self._tables = batch.tables.copy()
        changed = list(batch.table_changes)
        self._tables[changed] = batch.tables[changed]

    def compute(self, batch: Batch, before: list[Sampled]) -> list[Sampled]:
        pool = self.cache.tokens
        for source, destination in batch.copies:
            pool[destination] = pool[source]
        ids = [token if token >= 0 else before[-1 - token].token for token in batch.input_ids.tolist()]
        assert batch.query_start[-1] == len(ids) == len(batch.positions)
        assert all(np.diff(batch.query_start)[: batch.num_decode] == 1)
        contexts: dict[int, list[int]] = {}
        rows = [(s, r) for s in range(len(batch.seats)) for r in range(batch.query_start[s], batch.query_start[s + 1])]
        for s, row in rows:  # all writes of a layer before any read, as in a step
            position = int(batch.positions[row])
            pool[batch.tables[batch.seats[s], position // pool.shape[1]], position % pool.shape[1]] = ids[row]
        for s, row in rows:
            length = int(batch.positions[row]) + 1
            assert length <= batch.seq_lens[s]
            contexts[row] = pool[batch.tables[batch.seats[s]]].reshape(-1)[:length].tolist()
            assert POISON not in contexts[row], "the context has a hole"
        chosen = zip(batch.sample_from.tolist(), batch.sample_rows, strict=True)
        return [Sampled(next_token(contexts[row], sample, len(contexts[row]))) for row, sample in chosen]


class _Done(Step):
    def tokens(self) -> list[Sampled]:
        return self.sampled
