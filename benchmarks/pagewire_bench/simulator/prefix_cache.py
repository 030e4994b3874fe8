"""A simulated worker's KV blocks: some held, some cached (least recently used first), some free."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence


class PrefixCache:
    """Counts blocks of one hash each. `stored` and `removed` are told what becomes and ceases to be findable."""

    def __init__(
        self, num_blocks: int, stored: Callable[[list[bytes]], None], removed: Callable[[list[bytes]], None]
    ) -> None:
        self.num_blocks = num_blocks
        self._held: Counter[bytes] = Counter()
        self._cached: OrderedDict[bytes, None] = OrderedDict()
        self._private = 0  # held blocks that nobody else can find
        self._stored, self._removed = stored, removed

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Cached ones included."""
        return self.num_blocks - len(self._held) - self._private

    def hit(self, hashes: Sequence[bytes]) -> int:
        for count, value in enumerate(hashes):
            if value not in self._held and value not in self._cached:
                return count
        return len(hashes)

    def has_room(self, hashes: Sequence[bytes], private: int) -> bool:
        """Whether these findable blocks and so many others can be held."""
        return private + sum(value not in self._held for value in hashes) <= self.num_free

    def hold(self, hashes: Sequence[bytes], private: int) -> None:
        """Holds blocks that are findable (`hashes`) and others; evicts what must go."""
        for value in hashes:
            self._cached.pop(value, None)
            self._held[value] += 1
        self._private += private
        self._evict()

    def publish(self, hashes: Sequence[bytes]) -> None:
        """Private blocks that are full now can be found, if no other block equals them."""
        new = [value for value in hashes if value not in self._held]
        for value in hashes:
            self._cached.pop(value, None)
            self._held[value] += 1
        self._private -= len(hashes)
        self._evict()
        self._stored(new)

    def release(self, hashes: Sequence[bytes], private: int) -> None:
        for value in reversed(hashes):
            self._held[value] -= 1
            if not self._held[value]:
                del self._held[value]
                self._cached[value] = None
        self._private -= private

    def _evict(self) -> None:
        gone: list[bytes] = []
        while len(self._held) + self._private + len(self._cached) > self.num_blocks and self._cached:
            gone.append(self._cached.popitem(last=False)[0])
        if gone:
            self._removed(gone)
