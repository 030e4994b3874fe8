"""Who was refused room and asks for it again, in the order of their first asking.

A prompt that is refused holds nothing, so one that needs much would never find it free beside a stream of small ones:
within a router they go in order, but other routers know nothing of it. So what those before it wait for is not there
for who came later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

PATIENCE_S = 1.0  # a router asks again after half a second at the latest, unless it found room elsewhere


@dataclass
class _Waiting:
    blocks: int
    asked_at: float
    again: bool = False  # it was refused more than once: who finds room elsewhere at once keeps nothing from others


class Line:
    """Lives on the event loop. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[Hashable, _Waiting] = {}

    def ahead_of(self, who: Hashable) -> int:
        """Blocks that those wait for who asked before."""
        latest = self._clock() - PATIENCE_S
        self._waiting = {name: waiting for name, waiting in self._waiting.items() if waiting.asked_at >= latest}
        blocks = 0
        for name, waiting in self._waiting.items():
            if name == who:
                break
            blocks += waiting.blocks if waiting.again else 0
        return blocks

    def refused(self, who: Hashable, blocks: int) -> None:
        """It keeps its place if it had one."""
        again = who in self._waiting
        self._waiting[who] = _Waiting(blocks, self._clock(), again)

    def leave(self, who: Hashable) -> None:
        """It has its room. Idempotent."""
        self._waiting.pop(who, None)
