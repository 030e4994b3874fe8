"""Runs a batch as one call of the compiled CPU step."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import torch
from pagewire_kernels.cpu.cores import Cores
from pagewire_kernels.cpu.library import STRIP, Model
from pagewire_kernels.cpu.library import Batch as BatchStruct

from pagewire_engine.batch import Batch
from pagewire_engine.cpu.kv_cache import PackedKVCache
from pagewire_engine.cpu.model import CpuModel
from pagewire_engine.layer_progress import LayerProgress
from pagewire_engine.model_runner import Arrays, Done, Launched, Tensors
from pagewire_engine.sampler import NO_TOKEN, Sampled, sample, uniform
from pagewire_engine.scoring import score_rows

_LOGITS, _HIDDEN = 1, 2  # what a row may give instead of a token
SMALL_STEP = 4 << 20  # weights; steps that go through fewer run on one thread
_CHOICE = np.dtype(
    [("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("uniform", "f8")], align=True
)


class CpuRunner:
    """Its threads keep to `cores`."""

    overlaps = False

    def __init__(self, library: ctypes.CDLL, model: CpuModel, cache: PackedKVCache, cores: Cores) -> None:
        self.config = model.config
        self.cache = cache
        self._library, self._model, self.cores = library, model, cores
        model.fill(cache.model)
        self._runner = library.pw_runner(cores.handle, SMALL_STEP)
        self.progress = LayerProgress()
        self._vocab = -(-self.config.vocab_size // STRIP) * STRIP
        self._logits = np.empty((0, self._vocab), np.float32)
        weakref.finalize(self, library.pw_runner_free, self._runner)

    def launch(self, batch: Batch) -> Launched:
        sampling = self.sampling(batch)
        result = self.compute(batch, sampling)
        assert result is not None
        return Done.with_scores(batch, self.choose(batch, sampling, result), result)

    def sampling(self, batch: Batch) -> Arrays:
        """How each row's token is drawn, and whether its logits are wanted instead."""
        choices, raw = _choices(batch)
        return {"choices": choices, "raw": raw}

    def compute(self, batch: Batch, sampling: Arrays) -> Tensors | None:
        """tokens int32 [R], -1 where logits are wanted; logits float32 of those that want them."""
        part, size = self._model.peers.part, (len(batch.input_ids), self.config.hidden_size)
        self.cache.copy_blocks(batch.copies)
        before = None if part.is_first else torch.empty(size, dtype=torch.float32)
        if before is not None:
            self._model.peers.receive(before)
        after = torch.empty(size, dtype=torch.float32) if batch.scored or not part.is_last else None
        raw = sampling["raw"]
        hidden = np.empty((len(raw), self.config.hidden_size) if (raw == _HIDDEN).any() else 0, np.float32)
        tokens = self._step(batch, sampling["choices"].view(_CHOICE), raw, hidden, before, after)
        if not part.is_last:
            assert after is not None
            self._model.peers.send(after)
            return None
        logits = torch.from_numpy(self._logits[np.flatnonzero(raw == _LOGITS), : self.config.vocab_size])
        result = {"tokens": torch.from_numpy(tokens), "logits": logits}
        if batch.scored and after is not None:
            rows, ids = torch.from_numpy(batch.scored.rows).long(), torch.from_numpy(batch.scored.ids)
            result |= score_rows(after[rows], ids, batch.scored.num_top, self.config.vocab_size, self._head)
        return result | {"hidden": torch.from_numpy(hidden[raw == _HIDDEN])} if hidden.size else result

    def _head(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits float32 [R, vocabulary] of rows of the last layer, float32 [R, E]: a step of no layers."""
        model, num_rows = Model.from_buffer_copy(self.cache.model), len(rows)
        model.layers, model.embedding = 0, None
        every, choices = np.arange(num_rows, dtype=np.int32), np.zeros(num_rows, _CHOICE)
        tokens, logits = np.empty(num_rows, np.int32), np.empty((num_rows, self._vocab), np.float32)
        raw = np.full(num_rows, _LOGITS, np.uint8)
        struct = BatchStruct(
            num_rows=num_rows, num_samples=num_rows, sample_from=_at(every), choices=_at(choices), raw=_at(raw),
            tokens=_at(tokens), logits=_at(logits), hidden_in=rows.data_ptr(),
        )  # fmt: skip
        if self._library.pw_step(self._runner, ctypes.byref(model), ctypes.byref(struct)):
            self._model.raise_failure()
        return torch.from_numpy(logits)[:, : self.config.vocab_size]

    def _step(
        self,
        batch: Batch,
        choices: np.ndarray,
        raw: np.ndarray,
        hidden: np.ndarray,
        before: torch.Tensor | None,
        after: torch.Tensor | None,
    ) -> np.ndarray:
        samples = len(batch.sample_from)
        tokens = np.empty(samples, np.int32)
        if samples > len(self._logits) and (raw.any() or choices["temperature"].any()):
            self._logits = np.empty((samples * 2, self._vocab), np.float32)
        allowed = None if batch.allowed is None else _at(batch.allowed)
        struct = BatchStruct(
            len(batch.input_ids), len(batch.seq_lens), samples, _at(batch.input_ids), _at(batch.query_start),
            _at(batch.seq_lens), _at(batch.tables), _at(batch.seats), batch.tables.shape[1], _at(batch.sample_from),
            _at(choices), _at(raw), allowed, _at(tokens), _at(self._logits),
            None if before is None else before.data_ptr(), None if after is None else after.data_ptr(),
        )  # fmt: skip
        if batch.layer_group:
            self.progress.begin(batch.number)
            struct.progress = _at(self.progress.cell)
            struct.progress_group, struct.progress_pipe = batch.layer_group, self.progress.writing
        struct.hidden = _at(hidden)
        if self._library.pw_step(self._runner, ctypes.byref(self.cache.model), ctypes.byref(struct)):
            self._model.raise_failure()
        return tokens

    def rest(self) -> None:
        self.cores.rest()

    def choose(self, batch: Batch, sampling: Arrays, result: Tensors) -> list[Sampled]:
        """The step's own tokens, and those of the rows whose logits it gave back; hidden states of rows that embed."""
        tokens, raw = result["tokens"].numpy(), sampling["raw"]
        wanted = np.flatnonzero(raw == _LOGITS)
        sampled = [Sampled(token) for token in tokens.tolist()]
        if len(wanted):
            num_tokens = (batch.positions[batch.sample_from[wanted]] + 1).tolist()
            allowed = None if batch.allowed is None else batch.allowed[wanted]
            chosen = sample(result["logits"], [batch.sample_rows[i] for i in wanted], num_tokens, allowed)
            for row, token in zip(wanted, chosen, strict=True):
                sampled[row] = token
        for i, row in enumerate(np.flatnonzero(raw == _HIDDEN)):
            sampled[row] = Sampled(NO_TOKEN, hidden=result["hidden"][i])
        return sampled


def _choices(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """For every row how its token is drawn, and whether its logits are wanted instead."""
    rows = batch.sample_rows
    choices, raw = np.zeros(len(rows), _CHOICE), np.zeros(len(rows), np.uint8)
    for i, row in enumerate(rows):
        p = row.params
        if p.embeds:
            raw[i] = _HIDDEN
        elif p.needs_logits:
            raw[i] = _LOGITS
        elif p.temperature > 0:
            position = int(batch.positions[batch.sample_from[i]]) + 1
            choices[i] = p.temperature, p.top_p, p.min_p, p.top_k, uniform(p.seed, row.choice, position)
    return choices, raw


def _at(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
