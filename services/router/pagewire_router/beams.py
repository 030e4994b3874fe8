"""Beam search as vLLM has it, round by round; no I/O and no model.

Every live beam is given its 2 * width likeliest next tokens. A token that ends a sequence makes a finished beam of it,
wherever it ranks; of all others, the `width` with the largest sum of log probabilities live on. At the end finished and
live beams are ordered by sum / length ** length_penalty. The length counts the prompt, but not an end of sequence at
the beam's end. What cannot be among the best any more is dropped, and the search ends when that is true of all live
beams: sums only fall, so the answer is that of all rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

from pagewire.v1 import common_pb2

T = TypeVar("T")


@dataclass(frozen=True)
class Beam:
    """`tokens` with the log probabilities that the client is told; total: the sum of all, that of `ended_by` too."""

    tokens: tuple[common_pb2.SampledToken, ...] = ()
    total: float = 0.0
    ended_by: int | None = None

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass
class Beams:
    """One search. eos_ids: what ends a sequence, unless ignore_eos. keep_end: it is a finished beam's last token."""

    width: int
    length_penalty: float
    prompt_tokens: int
    max_tokens: int
    eos_ids: Set[int]
    ignore_eos: bool = False
    keep_end: bool = False
    live: list[Beam] = field(default_factory=lambda: [Beam()])
    _finished: list[Beam] = field(default_factory=list)  # best first

    def advance(self, offered: Sequence[Sequence[common_pb2.SampledToken]]) -> None:
        """offered: of each live beam, the next tokens, best first."""
        candidates: list[tuple[float, Beam, common_pb2.SampledToken]] = []
        for beam, tokens in zip(self.live, offered, strict=True):
            for token in tokens:
                total = beam.total + token.logprob
                if token.token_id in self.eos_ids and not self.ignore_eos:
                    kept = (*beam.tokens, token) if self.keep_end else beam.tokens
                    self._finished.append(Beam(kept, total, token.token_id))
                else:
                    candidates.append((total, beam, token))
        self._finished = _first(self._finished, self.score, self.width)
        grown = _first(candidates, lambda candidate: candidate[0], self.width)
        self.live = [Beam((*beam.tokens, token), total) for total, beam, token in grown]

    @property
    def settled(self) -> bool:
        """No live beam can come before the finished ones that there are."""
        if not self.live:
            return True
        if len(self._finished) < self.width:
            return False
        worst = self.score(self._finished[-1])
        return all(worst >= self._best_to_come(beam) for beam in self.live)

    def best(self) -> list[Beam]:
        """The `width` best, best first."""
        return _first([*self._finished, *self.live], self.score, self.width)

    def score(self, beam: Beam) -> float:
        ends = bool(beam.tokens) and beam.tokens[-1].token_id in self.eos_ids
        return self._score(beam.total, len(beam.tokens) - ends)

    def _best_to_come(self, beam: Beam) -> float:
        """What a beam's score would be if nothing more made it less likely: the longest is best, or the shortest."""
        return self._score(beam.total, self.max_tokens if self.length_penalty > 0 else len(beam.tokens))

    def _score(self, total: float, num_tokens: int) -> float:
        return total / float(self.prompt_tokens + num_tokens) ** self.length_penalty


def _first(things: Iterable[T], key: Callable[[T], float], count: int) -> list[T]:
    """Those with the largest keys, largest first; of equal ones the earlier."""
    return sorted(things, key=key, reverse=True)[:count]
