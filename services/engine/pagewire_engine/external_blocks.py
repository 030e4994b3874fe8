"""Blocks that incoming transfers hold beside the engine's own sequences: promised, pinned and bound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Seq

from pagewire_core.block_hash import PageKeys
from pagewire_core.errors import InvalidRequest, Overloaded

from pagewire_engine.block_manager import BlockManager, OutOfBlocks
from pagewire_engine.config import EngineConfig
from pagewire_engine.line import Line


class ExternalBlocks:
    """Part of the engine's books, under the engine's lock; any thread may call.

    reserved: blocks that are promised and not yet bound. line: those who are to be promised some as soon as can be.
    wake: notified when something is given back. wanted: how many free blocks the engine's own first in the queue waits
    for, if it came before a point in time.
    """

    def __init__(
        self,
        blocks: BlockManager,
        config: EngineConfig,
        lock: threading.RLock,
        wake: threading.Condition,
        wanted: Callable[[float], int],
    ) -> None:
        self._blocks, self._config, self._lock, self._wake, self._wanted = blocks, config, lock, wake, wanted
        self._held: dict[object, list[int]] = {}  # by owner
        self.reserved = 0
        self.line = Line()

    @property
    def tables(self) -> list[list[int]]:
        """The block tables of all owners."""
        return list(self._held.values())

    @property
    def num_held(self) -> int:
        """Blocks of all owners."""
        return len({block for table in self._held.values() for block in table})

    def pin_prefix(self, owner: object, prompt: Seq[int], cache_root: bytes) -> int:
        """Holds the blocks of the prompt's locally cached prefix for `owner`; returns its tokens.

        Raises InvalidRequest for an owner that holds blocks: peers name the owners of what they ask for.
        """
        keys: list[bytes] = []
        if self._config.enable_prefix_caching:
            keys = PageKeys(cache_root, self._config.block_size).extend(prompt, len(prompt))
        with self._lock:
            if owner in self._held:
                raise InvalidRequest("this transfer id is in use")
            blocks = self._blocks.match(keys)
            self._held[owner] = blocks
            return len(blocks) * self._config.block_size

    def reserve(self, num_blocks: int, claimant: Hashable = None) -> None:
        """Promises blocks without binding them. Raises Overloaded if there are not as many.

        Those that others wait for who came first are not there for it, here in the queue or in the line: a large prompt
        might wait for ever. claimant: who has a place in the line from the first refusal on; None asks but once.
        """
        with self._lock:
            came_at = self.line.came_at(claimant)
            ahead = self._wanted(came_at) + sum(self.line.before(came_at))
            free = max(self._blocks.num_free - self.reserved - ahead, 0)
            if num_blocks > free:
                if claimant is not None:
                    self.line.refused(claimant, num_blocks)
                raise Overloaded(f"{num_blocks} KV blocks wanted, {free} free", retry_after_s=1.0)
            self.line.leave(claimant)
            self.reserved += num_blocks

    def renounce(self, claimant: Hashable) -> None:
        """It waits for blocks in the line no more. Idempotent."""
        with self._lock:
            self.line.leave(claimant)
            self._wake.notify()

    def unreserve(self, num_blocks: int) -> None:
        with self._lock:
            self.reserved -= num_blocks
            assert self.reserved >= 0
            self._wake.notify()

    def bind(self, owner: object, num_tokens: int) -> list[int]:
        """Extends the blocks of `owner` to hold `num_tokens`; returns its block table. Raises Overloaded."""
        with self._lock:
            table = self._held[owner]
            try:
                table += self._blocks.allocate(self._config.blocks_for(num_tokens) - len(table))
            except OutOfBlocks as error:
                raise Overloaded(f"out of KV blocks: {error}", retry_after_s=1.0) from None
            return list(table)

    def unbind(self, owner: object) -> list[int]:
        """Hands the blocks of `owner` to the caller, who now holds the references."""
        with self._lock:
            return self._held.pop(owner)

    def table(self, owner: object) -> list[int]:
        """The blocks of `owner`; empty if it holds none."""
        with self._lock:
            return list(self._held.get(owner, ()))

    def free(self, owner: object) -> None:
        """Gives back whatever `owner` holds. Idempotent."""
        with self._lock:
            self._blocks.release(self._held.pop(owner, []))
            self._wake.notify()
