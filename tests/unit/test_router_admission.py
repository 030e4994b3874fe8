from __future__ import annotations

import asyncio
import contextlib

import pytest
from pagewire_core.errors import DeadlineExceeded, Overloaded, Unavailable
from pagewire_router.admission import Admission


def soon(seconds: float = 10.0) -> float:
    return asyncio.get_running_loop().time() + seconds


class Visitor:
    """A request that stays until told to go."""

    def __init__(self, admission: Admission, weight: int = 1, seconds: float = 10.0) -> None:
        self.inside = False
        self._go = asyncio.Event()
        self.task = asyncio.create_task(self._visit(admission, weight, seconds))

    async def _visit(self, admission: Admission, weight: int, seconds: float) -> None:
        async with admission.slot(weight, soon(seconds)):
            self.inside = True
            await self._go.wait()
        self.inside = False

    async def leave(self) -> None:
        self._go.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_start_in_the_order_they_came() -> None:
    admission = Admission(10, lambda: 1)
    visitors = [Visitor(admission) for _ in range(3)]
    await settle()
    assert [v.inside for v in visitors] == [True, False, False]
    assert (admission.num_running, admission.num_queued) == (1, 2)
    for number, visitor in enumerate(visitors):
        assert visitor.inside
        await visitor.leave()
        await settle()
        assert [v.inside for v in visitors[number + 1 :]] == [True, False][: 2 - number]
    assert (admission.num_running, admission.num_queued) == (0, 0)


async def test_a_full_queue_says_when_to_come_back() -> None:
    admission = Admission(1, lambda: 1)
    visitors = [Visitor(admission), Visitor(admission)]
    await settle()
    with pytest.raises(Overloaded) as caught:
        async with admission.slot(1, soon()):
            pass
    assert caught.value.retry_after_s >= 1
    for visitor in visitors:
        await visitor.leave()


async def test_a_vanished_client_leaves_the_queue() -> None:
    admission = Admission(10, lambda: 1)
    first, gone, last = Visitor(admission), Visitor(admission), Visitor(admission)
    await settle()
    gone.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await gone.task
    assert admission.num_queued == 1
    await first.leave()
    await settle()
    assert last.inside
    await last.leave()


async def test_a_client_that_vanishes_as_it_is_let_in_takes_no_room() -> None:
    """The turn was given and the task cancelled before it could run: its room was never returned."""
    admission = Admission(10, lambda: 1)
    first, gone = Visitor(admission), Visitor(admission)
    await settle()
    first._go.set()
    while admission.num_queued:
        await asyncio.sleep(0)
    gone.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await gone.task
    assert admission.num_running == 0
    last = Visitor(admission)
    await settle()
    assert last.inside
    await last.leave()


async def test_waiting_ends_with_the_deadline() -> None:
    admission = Admission(10, lambda: 1)
    first, late = Visitor(admission), Visitor(admission, seconds=0.02)
    with pytest.raises(DeadlineExceeded):
        await late.task
    assert admission.num_queued == 0
    await first.leave()


async def test_a_heavy_request_waits_for_room_and_one_beyond_all_room_runs_alone() -> None:
    admission = Admission(10, lambda: 4)
    light, heavy = Visitor(admission, 3), Visitor(admission, 9)
    await settle()
    assert not heavy.inside
    await light.leave()
    await settle()
    assert heavy.inside
    await heavy.leave()


async def test_more_capacity_lets_waiting_requests_in() -> None:
    capacity = 1
    admission = Admission(10, lambda: capacity)
    visitors = [Visitor(admission), Visitor(admission)]
    await settle()
    capacity = 2
    admission.wake()
    await settle()
    assert [v.inside for v in visitors] == [True, True]
    for visitor in visitors:
        await visitor.leave()


async def test_closing_refuses_who_waits_and_spares_who_runs() -> None:
    admission = Admission(10, lambda: 1)
    running, waiting = Visitor(admission), Visitor(admission)
    await settle()
    admission.close()
    with pytest.raises(Unavailable):
        await waiting.task
    with pytest.raises(Unavailable):
        async with admission.slot(1, soon()):
            pass
    await running.leave()
