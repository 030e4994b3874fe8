"""How often drafts come true, for each sequence and over all.

A prediction is compared with the tokens that came, whether or not it was computed as a draft: for n-grams,
whose predictions cost nothing, the rate is known even while speculation is off.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

_FIRST_GUESS = 0.7  # optimistic: the first steps cost little and tell the truth


class AcceptanceRate:
    """Chance that a draft token is accepted if those before it were; an exponential moving average.

    keep: weight of what was known after one more token. prior: what to believe until there is evidence,
    worth `weight` tokens.
    """

    def __init__(self, keep: float, weight: float, prior: AcceptanceRate | None = None) -> None:
        self._keep, self._weight, self._prior = keep, weight, prior
        self._accepted = self._tried = 0.0

    def add(self, accepted: int, tried: int) -> None:
        """`tried` tokens were compared, at most the last of which was not accepted."""
        decay = self._keep**tried
        self._accepted = decay * self._accepted + accepted
        self._tried = decay * self._tried + tried

    @property
    def value(self) -> float:
        prior = self._prior.value if self._prior else _FIRST_GUESS
        return (self._accepted + self._weight * prior) / (self._tried + self._weight)


class OverallRate(AcceptanceRate):
    """Of all sequences of an engine."""

    def __init__(self) -> None:
        super().__init__(keep=0.995, weight=8.0)


class Prediction:
    """The last prediction for one sequence, and how well its predictions did so far."""

    def __init__(self, overall: OverallRate) -> None:
        self._overall = overall
        self._rate = AcceptanceRate(keep=0.95, weight=4.0, prior=overall)
        self._tokens: Seq[int] = ()
        self._begin = 0

    @property
    def rate(self) -> float:
        return self._rate.value

    def make(self, tokens: Seq[int], begin: int) -> None:
        """Predicts the tokens from position `begin` on."""
        self._tokens, self._begin = tokens, begin

    def settle(self, tokens: Seq[int]) -> None:
        """Compares the prediction with the sequence's tokens and forgets it."""
        if not self._tokens:
            return
        came = tokens[self._begin : self._begin + len(self._tokens)]
        accepted = common_prefix(self._tokens, came)
        tried = min(accepted + 1, len(came))
        self._rate.add(accepted, tried)
        self._overall.add(accepted, tried)
        self._tokens = ()


def common_prefix(left: Seq[int], right: Seq[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
