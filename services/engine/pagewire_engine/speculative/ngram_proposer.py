"""Proposes what followed the sequence's last tokens when it said them before."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from pagewire_engine.sequence import Sequence
from pagewire_engine.speculative.acceptance import Prediction
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.ngram import NgramIndex
from pagewire_engine.speculative.proposer import SpeculativeProposer

_INDEXED_PER_STEP = 4096  # tokens, about 1 ms: a long new prompt is indexed over several steps


class NgramProposer(SpeculativeProposer):
    """Prompt lookup. Every sequence is predicted, which is cheap; as much of it is proposed as pays."""

    num_held_blocks = 0

    def __init__(self, config: SpeculativeConfig, max_model_len: int) -> None:
        super().__init__(config, max_model_len)
        self._lengths = config.prompt_lookup_min, config.prompt_lookup_max
        self._indexes: dict[Sequence, NgramIndex] = {}

    def _draft(self, sequences: Seq[Sequence], predictions: Seq[Prediction]) -> list[list[int]]:
        room = _INDEXED_PER_STEP
        drafts = []
        for seq, prediction in zip(sequences, predictions, strict=True):
            index = self._indexes.get(seq)
            if index is None:
                index = self._indexes[seq] = NgramIndex(*self._lengths)
            room -= index.extend(seq.tokens, room)
            drafts.append(index.lookup(seq.tokens, self._limit(seq)))
            prediction.make(drafts[-1], len(seq.tokens))
        counts = self._choose(predictions, [len(draft) for draft in drafts])
        return [draft[:count] for draft, count in zip(drafts, counts, strict=True)]

    def _drop(self, seq: Sequence) -> None:
        self._indexes.pop(seq, None)
