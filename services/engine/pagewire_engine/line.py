"""Who was refused room and asks for it again, in the order of their first asking.

A prompt that is refused holds nothing, so one that needs much would never find it free beside a stream of small ones:
within a router they go in order, but other routers know nothing of it, nor does the engine's own queue. So what those
before it wait for is not there for who came later.

In the engine's queue that holds for prompts that decode here. One for another worker has room there, which others wait
for, perhaps for what this worker promises now: while there is one, the queue comes before the line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

PATIENCE_S = 1.0  # a router asks again after half a second at the latest, unless it found room elsewhere


@dataclass
class _Waiting:
    blocks: int
    came_at: float
    asked_at: float
    again: bool = False  # it was refused more than once: who finds room elsewhere at once keeps nothing from others


class Line:
    """Under the engine's lock. `clock` is in seconds, and the one of `Request.arrived`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[Hashable, _Waiting] = {}

    def came_at(self, who: Hashable) -> float:
        """When it asked first; now, if it has no place."""
        self._forget_the_gone()
        return self._waiting[who].came_at if who in self._waiting else self._clock()

    def before(self, when: float) -> list[int]:
        """Blocks that each of those waits for who came before, the first of them first."""
        self._forget_the_gone()
        return [waiting.blocks for waiting in self._waiting.values() if waiting.again and waiting.came_at < when]

    def refused(self, who: Hashable, blocks: int) -> None:
        """It keeps its place if it had one."""
        came_at, again = self.came_at(who), who in self._waiting
        self._waiting[who] = _Waiting(blocks, came_at, self._clock(), again)

    def leave(self, who: Hashable) -> None:
        """It has its room, or wants none any more. Idempotent."""
        self._waiting.pop(who, None)

    def _forget_the_gone(self) -> None:
        latest = self._clock() - PATIENCE_S
        for who in [who for who, waiting in self._waiting.items() if waiting.asked_at < latest]:
            del self._waiting[who]
