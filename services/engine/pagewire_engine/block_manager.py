"""The pages of the KV pool: who holds them, what they contain, which may be reused. No tensors here.

A block is in exactly one of three places:

    free      no content of value                                   `_free`
    cached    content of value, nobody holds it; LRU order           `_cached`
    held      ref_count >= 1; registered under its key once full

    free -> held (allocate) -> cached (release, if registered) -> held again (match)
                            -> free   (release, if not)            cached -> free (evicted by allocate)

Sequences release their blocks tail first and a child is never used without its parents, so LRU order
evicts leaves before the blocks they build on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence


class OutOfBlocks(Exception):
    """The pool has fewer free blocks than were asked for; nothing was allocated."""


class BlockManager:
    """Reference-counted blocks with a prefix cache.

    removed: told each key that ceases to be findable. freed: told the blocks that became free, before
    anything can reuse them. allocated: told the blocks that `allocate` gives. Blocks that were never used
    come in ascending order, after those that became free.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        removed: Callable[[bytes], None] = lambda key: None,
        freed: Callable[[Sequence[int]], None] = lambda blocks: None,
        allocated: Callable[[Sequence[int]], None] = lambda blocks: None,
    ) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._removed, self._freed, self._allocated = removed, freed, allocated

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest findable prefix of `keys`. Changes nothing."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Takes a reference to the blocks of the longest findable prefix of `keys`."""
        blocks = self.lookup(keys)
        for block in blocks:
            self.acquire(block)
        return blocks

    def acquire(self, block: int) -> None:
        """One more holder of a held or cached block."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each, evicting cached ones if need be. Raises OutOfBlocks."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} free")
        while len(self._free) < count:
            self._evict()
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._ref_counts[block] = 1
        self._allocated(blocks)
        return blocks

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        self._keys[block] = None
        del self._by_key[key]
        self._removed(key)
        self._free.append(block)
        self._freed([block])

    def register(self, block: int, key: bytes) -> int:
        """Makes a full, held block findable under `key`.

        If another block already is, the caller's reference moves to that one (equal content, one copy)
        and it is returned; otherwise `block` is.
        """
        known = self._by_key.get(key)
        if known == block:
            return block
        if known is not None:
            self.acquire(known)
            self.release([block])
            return known
        assert self._ref_counts[block] > 0 and self._keys[block] is None
        self._keys[block] = key
        self._by_key[key] = block
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each block, last block first."""
        gone = []
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} released twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._keys[block] is None:
                self._free.appendleft(block)  # its memory has been written: first come those, then new ones
                gone.append(block)
            else:
                self._cached[block] = None
        if gone:
            self._freed(gone)

    def reset_cache(self) -> None:
        """Forgets every cached block; held blocks stay findable."""
        while self._cached:
            self._evict()

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the books agree with `holders`, every block table there is."""
        counts = Counter(block for table in holders for block in table)
        held = {block for block, count in enumerate(self._ref_counts) if count}
        assert dict(counts) == {b: self._ref_counts[b] for b in held}, "reference counts disagree with the holders"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & held or cached & held), "a block is in two places"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is lost"
        assert {k: b for b, k in enumerate(self._keys) if k is not None} == self._by_key, "keys disagree"
        assert all(self._keys[block] is None for block in free), "a free block is findable"
