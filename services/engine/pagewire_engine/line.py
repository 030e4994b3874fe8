"""Who was refused a promise of blocks and asks for it again.

A prompt that is refused holds nothing, so one that needs much would never find it free beside a stream of small ones:
within a router they go in order, but other routers know nothing of it, nor does the engine's own queue. So what it
waits for is not there for who came later than it first asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

PATIENCE_S = 1.0  # a router asks again after half a second at the latest, unless it found room elsewhere


@dataclass
class _Waiting:
    blocks: int
    since: float
    asked_at: float
    again: bool = False  # it was refused more than once: who finds room elsewhere at once keeps nothing from others


class Line:
    """Under the engine's lock. Times are of `clock`, in seconds: that of `Request.arrived`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[Hashable, _Waiting] = {}

    def since(self, who: Hashable) -> float:
        """When it first asked."""
        self._forget()
        known = self._waiting.get(who)
        return known.since if known else self._clock()

    def claimed(self, before: float) -> int:
        """Blocks that those wait for who first asked before that time."""
        self._forget()
        return sum(waiting.blocks for waiting in self._waiting.values() if waiting.again and waiting.since < before)

    def refused(self, who: Hashable, blocks: int) -> None:
        """It keeps its place if it had one."""
        since, again = self.since(who), who in self._waiting
        self._waiting[who] = _Waiting(blocks, since, self._clock(), again)

    def leave(self, who: Hashable) -> None:
        """It has its blocks. Idempotent."""
        self._waiting.pop(who, None)

    def _forget(self) -> None:
        """Those who have not asked for long."""
        if self._waiting:
            latest = self._clock() - PATIENCE_S
            self._waiting = {who: waiting for who, waiting in self._waiting.items() if waiting.asked_at >= latest}
