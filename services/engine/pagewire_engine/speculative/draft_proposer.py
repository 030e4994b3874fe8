"""Proposes what a second model would say."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import structlog

from pagewire_engine.sampler import NO_TOKEN
from pagewire_engine.sequence import Sequence
from pagewire_engine.speculative.acceptance import Prediction
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.draft_model import DraftModel
from pagewire_engine.speculative.proposer import SpeculativeProposer

log = structlog.get_logger(__name__)


class DraftProposer(SpeculativeProposer):
    """Runs the draft model for the sequences for which that pays; its time counts in that.

    Sequences for which it failed get no more drafts: the next one would fail of the same.
    """

    def __init__(self, config: SpeculativeConfig, max_model_len: int, model: DraftModel) -> None:
        super().__init__(config, max_model_len)
        self._model = model
        self._failed: set[Sequence] = set()

    def _draft(self, sequences: Seq[Sequence], predictions: Seq[Prediction]) -> list[list[int]]:
        limits = [0 if seq in self._failed else self._limit(seq) for seq in sequences]
        counts = self._choose(predictions, limits)
        wanted = [(seq, count) for seq, count in zip(sequences, counts, strict=True) if count]
        drafts = dict(zip((seq for seq, _ in wanted), self._timed(wanted), strict=True))
        for seq, prediction in zip(sequences, predictions, strict=True):
            prediction.make(drafts.get(seq, ()), len(seq.tokens))
        return [drafts.get(seq, []) for seq in sequences]

    def _timed(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        if not wanted:
            return []
        started = time.perf_counter()
        try:
            drafts = self._model.draft(wanted)
        except Exception:  # guesses are lost, and nothing else
            log.exception("drafting failed")
            drafts = [[NO_TOKEN] for _ in wanted]
        for (seq, _), draft in zip(wanted, drafts, strict=True):
            if NO_TOKEN in draft:
                draft.clear()
                self._failed.add(seq)
                self._model.cache.drop(seq)
        if longest := max(len(draft) for draft in drafts):
            self.policy.times.add_drafting(len(wanted), longest, (time.perf_counter() - started) * 1e3)
        return drafts

    def _drop(self, seq: Sequence) -> None:
        self._model.cache.drop(seq)
        self._failed.discard(seq)

    @property
    def num_held_blocks(self) -> int:
        return self._model.cache.blocks.num_held
