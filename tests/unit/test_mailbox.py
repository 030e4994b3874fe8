"""The queue of what arrives token by token."""

from __future__ import annotations

import asyncio

import pytest
from pagewire_core.mailbox import Mailbox


async def test_items_come_in_order_whether_the_reader_waits_or_not() -> None:
    box: Mailbox[int] = Mailbox(9, lambda: None)
    box.put(1)
    box.put(2)
    assert [await box.get(), await box.get()] == [1, 2]
    waiting = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    box.put(3)
    box.put(4)
    assert [await waiting, await box.get()] == [3, 4]


async def test_a_cancelled_reader_loses_nothing() -> None:
    box: Mailbox[int] = Mailbox(9, lambda: None)
    waiting = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    waiting.cancel()
    box.put(1)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    box.put(2)
    assert [await box.get(), await box.get()] == [1, 2]


async def test_what_nobody_reads_is_dropped_and_its_reader_is_told() -> None:
    told: list[int] = []

    def overflow() -> None:
        told.append(1)
        box.put(-1)

    box: Mailbox[int] = Mailbox(3, overflow)
    for item in range(9):
        box.put(item)
    assert await box.get() == -1
    assert told == [1]
