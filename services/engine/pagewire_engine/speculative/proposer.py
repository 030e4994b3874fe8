"""Draft tokens for the decoding sequences of an engine, one step at a time.

The engine computes the drafts' rows together with the sequence's last token, samples every one of them as
it would have without drafts, and keeps the drafts that equal what it sampled.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence as Seq

import numpy as np

from pagewire_engine.sequence import Sequence
from pagewire_engine.speculative.acceptance import OverallRate, Prediction
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.policy import Policy


class SpeculativeProposer(ABC):
    """A Proposer of the engine; where the drafts come from is the subclass's.

    `propose` and `observe` are called by the engine's thread, `ended` by any, while `propose` runs too.
    """

    def __init__(self, config: SpeculativeConfig, max_model_len: int) -> None:
        self._most, self._max_model_len = config.num_speculative_tokens, max_model_len
        self._overall = OverallRate()
        self._predictions: dict[Sequence, Prediction] = {}
        self._ended: deque[Sequence] = deque()
        self._proposing = threading.Lock()
        self._proposed_at = 0.0
        self.policy = Policy(config.disable_by_batch_size)

    @abstractmethod
    def _draft(self, sequences: Seq[Sequence], predictions: Seq[Prediction]) -> list[list[int]]:
        """Drafts for live sequences, and `make` on their predictions."""

    @abstractmethod
    def _drop(self, seq: Sequence) -> None:
        """Forgets a sequence. Idempotent."""

    @property
    @abstractmethod
    def num_held_blocks(self) -> int:
        """Blocks of a pool of its own that sequences hold."""

    def propose(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Draft tokens for each sequence, [] where none are known or they would not pay."""
        with self._proposing:
            # One that is cancelled now was told of before: nothing would forget it again.
            live = [seq for seq in sequences if not seq.finished]
            predictions = [self._settle(seq) for seq in live]
            drafts = dict(zip(live, self._draft(live, predictions), strict=True))
        self._forget_ended()
        self._proposed_at = time.perf_counter()
        return [drafts.get(seq, []) for seq in sequences]

    def observe(self, proposed: int, accepted: int, num_sequences: int, milliseconds: float) -> None:
        """A step with `proposed` draft rows has landed. What was accepted shows in the tokens themselves.

        `milliseconds` is the device's part. What the host does for a step is saved with it, so all is counted
        since `propose`; with a small model it is the larger part.
        """
        self.policy.observe(num_sequences, proposed, (time.perf_counter() - self._proposed_at) * 1e3)

    def ended(self, seq: Sequence) -> None:
        """The sequence will not be proposed for again. Idempotent."""
        self._ended.append(seq)
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Unless `propose` is at work: then it does so afterwards."""
        while self._ended and self._proposing.acquire(blocking=False):
            try:
                while self._ended:
                    seq = self._ended.popleft()
                    self._predictions.pop(seq, None)
                    self._drop(seq)
            finally:
                self._proposing.release()

    def _settle(self, seq: Sequence) -> Prediction:
        """The sequence's predictions, the last one compared with what came."""
        prediction = self._predictions.get(seq)
        if prediction is None:
            prediction = self._predictions[seq] = Prediction(self._overall)
        prediction.settle(seq.tokens)
        return prediction

    def _limit(self, seq: Sequence) -> int:
        """Drafts that the sequence can use: one more token comes anyway."""
        num_output = len(seq.tokens) - seq.num_prompt
        left = min(seq.request.params.max_tokens - num_output, self._max_model_len - len(seq.tokens))
        return max(min(self._most, left - 1), 0)

    def _choose(self, predictions: Seq[Prediction], limits: Seq[int]) -> list[int]:
        """How many drafts of at most `limits` each sequence gets."""
        able = [index for index, limit in enumerate(limits) if limit]
        chosen = [0] * len(limits)
        if able:
            rates = np.array([predictions[index].rate for index in able])
            counts = self.policy.choose(len(limits), rates, np.array([limits[index] for index in able], np.int64))
            for index, count in zip(able, counts.tolist(), strict=True):
                chosen[index] = count
        return chosen
