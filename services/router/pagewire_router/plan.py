"""A way to serve a request, what it is predicted to cost, and the choice among several."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from pagewire_router.links import Links
from pagewire_router.load import Ask, Pool


@dataclass(frozen=True)
class Plan:
    """`prefill` None: the decode worker computes the prompt itself. `cost` is the sum of `terms`."""

    prefill: str | None
    decode: str
    terms: Mapping[str, float]

    @property
    def cost(self) -> float:
        return sum(self.terms.values())

    @property
    def workers(self) -> tuple[str, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


@dataclass(frozen=True)
class Policy:
    """`plans` gives the ways to serve a request, best first; those within a tie of the first are as good."""

    unit: str
    plans: Callable[[Ask, Pool, Links], list[Plan]]
    tie_ratio: float = 1.0
    tie: float = 0.0

    def best(self, plans: Sequence[Plan]) -> list[Plan]:
        """The plans that are as good as the first."""
        best = plans[0].cost
        limit = max(best * self.tie_ratio, best + self.tie)
        return list(takewhile(lambda plan: plan.cost <= limit, plans))

    def choose(self, plans: Sequence[Plan], rng: random.Random) -> Plan:
        """One of the best, each equally likely: no herd runs to one worker."""
        return rng.choice(self.best(plans))
