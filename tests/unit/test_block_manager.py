"""The block manager against random workloads; its own books are checked after every operation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from pagewire_engine.block_manager import BlockManager, OutOfBlocks


class Workload(RuleBasedStateMachine):
    """Sequences that allocate, share, register and release; `content` is the key each block last got."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.live: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.blocks = BlockManager(12, removed=lambda key: None, freed=self._freed)

    def _freed(self, blocks: list[int]) -> None:
        for block in blocks:
            self.content.pop(block, None)

    @rule(target=tables, count=st.integers(0, 5))
    def allocate(self, count: int) -> list[int]:
        free = self.blocks.num_free
        try:
            table = self.blocks.allocate(count)
        except OutOfBlocks:
            assert count > free
            table = []
        self.live.append(table)
        return table

    @rule(table=tables, key=st.integers(0, 6))
    def register(self, table: list[int], key: int) -> None:
        """Equal keys stand for equal content; a table's block may be swapped for the known one."""
        name = b"%d" % key
        for index, block in enumerate(table):
            if self.blocks._keys[block] is None:
                table[index] = self.blocks.register(block, name)
                assert self.content.setdefault(table[index], name) == name
                return

    @rule(target=tables, keys=st.lists(st.integers(0, 6), max_size=4))
    def match(self, keys: list[int]) -> list[int]:
        names = [b"%d" % key for key in keys]
        expected = self.blocks.lookup(names)
        table = self.blocks.match(names)
        assert table == expected
        assert [self.content[block] for block in table] == names[: len(table)]
        self.live.append(table)
        return table

    @rule(table=consumes(tables))
    def release(self, table: list[int]) -> None:
        self.blocks.release(table)
        self.live = [other for other in self.live if other is not table]
        table.clear()

    @rule()
    def reset(self) -> None:
        self.blocks.reset_cache()

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check(self.live)


TestWorkload = Workload.TestCase
TestWorkload.settings = settings(max_examples=60, stateful_step_count=30)


def test_leaves_are_evicted_before_the_blocks_they_build_on() -> None:
    """A prefix with its first block gone is of no use, however many later blocks are left."""
    removed: list[bytes] = []
    blocks = BlockManager(4, removed=removed.append)
    table = blocks.allocate(4)
    for block, key in zip(table, (b"a", b"b", b"c", b"d"), strict=True):
        blocks.register(block, key)
    blocks.release(table)
    for _ in range(4):
        blocks.allocate(1)
    assert removed == [b"d", b"c", b"b", b"a"]


def test_using_a_prefix_again_keeps_it_longer_than_an_unused_one() -> None:
    removed: list[bytes] = []
    blocks = BlockManager(2, removed=removed.append)
    for key in (b"old", b"new"):
        table = blocks.allocate(1)
        blocks.register(table[0], key)
        blocks.release(table)
    blocks.release(blocks.match([b"old"]))
    blocks.allocate(1)
    assert removed == [b"new"]


def test_an_impossible_allocation_changes_nothing() -> None:
    blocks = BlockManager(3)
    table = blocks.allocate(1)
    blocks.register(table[0], b"k")
    blocks.release(table)
    with pytest.raises(OutOfBlocks):
        blocks.allocate(4)
    assert blocks.lookup([b"k"]) and blocks.num_free == 3


def test_releasing_twice_is_caught() -> None:
    blocks = BlockManager(3)
    table = blocks.allocate(1)
    blocks.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(table)


def test_blocks_that_become_free_are_told_of_before_they_are_given_again() -> None:
    """One whose content is kept is not free before it makes room."""
    told: list[tuple[str, list[int]]] = []
    blocks = BlockManager(
        3,
        freed=lambda some: told.append(("freed", list(some))),
        allocated=lambda some: told.append(("taken", list(some))),
    )
    kept, gone = blocks.allocate(2)
    blocks.register(kept, b"key")
    blocks.release([kept, gone])
    assert told[1:] == [("freed", [gone])]
    again = blocks.allocate(3)
    assert told[2:] == [("freed", [kept]), ("taken", again)]
