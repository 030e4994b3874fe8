"""Runs a batch as one call of the compiled CPU step."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import torch
from pagewire_core.errors import Internal
from pagewire_kernels.cpu.library import STRIP
from pagewire_kernels.cpu.library import Batch as BatchStruct

from pagewire_engine.batch import Batch
from pagewire_engine.cpu.kv_cache import PackedKVCache
from pagewire_engine.cpu.model import CpuModel
from pagewire_engine.model_runner import Done, Launched
from pagewire_engine.sampler import NOT_NUMBERS, Sampled, sample, uniform

SMALL_STEP = 4 << 20  # weights; steps that go through fewer run on one thread
_CHOICE = np.dtype(
    [("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("uniform", "f8")], align=True
)


class CpuRunner:
    """threads: of the step; cpus: the cores that they divide among them, or none: wherever the system puts them."""

    overlaps = False

    def __init__(
        self, library: ctypes.CDLL, model: CpuModel, cache: PackedKVCache, threads: int, cpus: tuple[int, ...]
    ) -> None:
        assert not cpus or len(cpus) >= threads
        self.config = model.config
        self.cache = cache
        self._library, self._model = library, model
        model.fill(cache.model)
        self._runner = library.pw_runner(threads, (ctypes.c_int32 * len(cpus))(*cpus), len(cpus), SMALL_STEP)
        self.threads = threads
        self._vocab = -(-self.config.vocab_size // STRIP) * STRIP
        self._logits = np.empty((0, self._vocab), np.float32)
        weakref.finalize(self, library.pw_runner_free, self._runner)

    def launch(self, batch: Batch) -> Launched:
        self.cache.copy_blocks(batch.copies)
        rows = batch.sample_rows
        choices, raw = _choices(batch)
        tokens = np.empty(len(rows), np.int32)
        if len(rows) > len(self._logits) and (raw.any() or choices["temperature"].any()):
            self._logits = np.empty((len(rows) * 2, self._vocab), np.float32)
        allowed = None if batch.allowed is None else _at(batch.allowed)
        struct = BatchStruct(
            len(batch.input_ids), len(batch.seq_lens), len(rows), _at(batch.input_ids), _at(batch.query_start),
            _at(batch.seq_lens), _at(batch.tables), _at(batch.seats), batch.tables.shape[1], _at(batch.sample_from),
            _at(choices), _at(raw), allowed, _at(tokens), _at(self._logits),
        )  # fmt: skip
        self._library.pw_step(self._runner, ctypes.byref(self.cache.model), ctypes.byref(struct))
        return Done(self._sampled(batch, tokens, raw))

    def _sampled(self, batch: Batch, tokens: np.ndarray, raw: np.ndarray) -> list[Sampled]:
        """The step's own tokens, and those of the rows whose logits it gave back."""
        wanted = np.flatnonzero(raw)
        if np.any(tokens[raw == 0] < 0):
            raise Internal(NOT_NUMBERS)
        sampled = [Sampled(token) for token in tokens.tolist()]
        if len(wanted):
            logits = torch.from_numpy(self._logits[wanted, : self.config.vocab_size])
            num_tokens = (batch.positions[batch.sample_from[wanted]] + 1).tolist()
            allowed = None if batch.allowed is None else batch.allowed[wanted]
            chosen = sample(logits, [batch.sample_rows[i] for i in wanted], num_tokens, allowed)
            for row, token in zip(wanted, chosen, strict=True):
                sampled[row] = token
        return sampled


def _choices(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """For every row how its token is drawn, and whether its logits are wanted instead."""
    rows = batch.sample_rows
    choices, raw = np.zeros(len(rows), _CHOICE), np.zeros(len(rows), np.uint8)
    for i, row in enumerate(rows):
        p = row.params
        if p.changes_logits or p.logprobs is not None:
            raw[i] = 1
        elif p.temperature > 0:
            position = int(batch.positions[batch.sample_from[i]]) + 1
            choices[i] = p.temperature, p.top_p, p.min_p, p.top_k, uniform(p.seed, row.choice, position)
    return choices, raw


def _at(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
