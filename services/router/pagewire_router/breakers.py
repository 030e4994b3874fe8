"""Circuit breakers: what fails again and again is left alone for a while, and tried with one attempt then.

    closed --failures in a row--> open --back-off--> half open --success--> closed
                                   ^                     |
                                   +---- twice as long --+ failure

One for each leg of an attempt, the worker (or pair of workers) of it, and the kind of error: a prefill leg
that fails says nothing about the decode worker, a transfer that fails nothing about either of its ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Leg = Literal["prefill", "transfer", "decode"]
LEGS: tuple[Leg, ...] = ("prefill", "transfer", "decode")
State = Literal["closed", "open", "half open"]

# Failures in a row that open it; seconds of the first back-off, and of the longest.
_LIMITS: dict[Leg, tuple[int, float, float]] = {
    "prefill": (3, 2.0, 60.0),
    "decode": (3, 2.0, 60.0),
    "transfer": (1, 30.0, 480.0),  # each try may cost somebody the whole --transfer-timeout
}


@dataclass
class Breaker:
    """`closed` while it has not failed often enough. Times are of the owner's clock."""

    leg: Leg
    workers: tuple[str, ...]
    cause: str
    failures: int = 0  # in a row
    backoff_s: float = 0.0  # 0: closed
    until: float = 0.0
    probing: bool = False  # the one attempt of a half-open breaker is under way

    def state(self, now: float) -> State:
        if not self.backoff_s:
            return "closed"
        return "open" if now < self.until else "half open"

    def attempt(self, now: float) -> None:
        """An attempt begins. Half open it is the only one until it is judged or the back-off is over once more."""
        if self.state(now) == "half open":
            self.probing = True
            self.until = now + self.backoff_s

    def fail(self, now: float) -> bool:
        """Counts a failure; True if that opens it. Of what was under way when it opened, nothing more is learnt."""
        threshold, first, longest = _LIMITS[self.leg]
        self.failures += 1
        if self.failures < threshold or (self.backoff_s and not self.probing):
            return False
        self.backoff_s = min(2 * self.backoff_s, longest) if self.backoff_s else first
        self.until, self.probing = now + self.backoff_s, False
        return True


class Breakers:
    """`opened` is told of every breaker that opens."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        opened: Callable[[Breaker], None] = lambda breaker: None,
    ) -> None:
        self._clock = clock
        self._opened = opened
        self._breakers: dict[tuple[Leg, tuple[str, ...]], dict[str, Breaker]] = {}

    def allows(self, leg: Leg, *workers: str) -> bool:
        if not self._breakers:
            return True
        now = self._clock()
        return all(b.state(now) != "open" for b in self._breakers.get((leg, workers), {}).values())

    def attempt(self, leg: Leg, *workers: str) -> None:
        for breaker in self._breakers.get((leg, workers), {}).values():
            breaker.attempt(self._clock())

    def succeeded(self, leg: Leg, *workers: str) -> None:
        self._breakers.pop((leg, workers), None)

    def failed(self, leg: Leg, cause: str, *workers: str) -> None:
        causes = self._breakers.setdefault((leg, workers), {})
        breaker = causes.setdefault(cause, Breaker(leg, workers, cause))
        if breaker.fail(self._clock()):
            self._opened(breaker)

    def forget(self, worker_id: str) -> None:
        """The process is gone: the next one of that name begins anew."""
        self._breakers = {key: causes for key, causes in self._breakers.items() if worker_id not in key[1]}

    def __iter__(self) -> Iterator[tuple[Breaker, State, float]]:
        """Every breaker that has counted a failure, its state, and seconds until it is half open."""
        now = self._clock()
        for causes in self._breakers.values():
            for breaker in causes.values():
                yield breaker, breaker.state(now), max(breaker.until - now, 0.0)
