from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace
from typing import Any

import pytest
from pagewire_core.errors import DeadlineExceeded, Overloaded
from pagewire_router import admission as admission_module
from pagewire_router.admission import Admission, Limits, Slot
from pagewire_router.fair_queue import QUANTUM
from pagewire_router.room import Room


def soon(seconds: float = 10.0) -> float:
    return asyncio.get_running_loop().time() + seconds


class Visitor:
    """A request that stays until told to go."""

    def __init__(
        self, admission: Admission, weight: int = 1, seconds: float = 10.0, tokens: int = 1, tenant: str = "",
        priority: int = 0,
    ) -> None:  # fmt: skip
        self.inside = False
        self.slot = Slot(tokens, tenant, priority, n=weight, deadline=soon(seconds))
        self._go = asyncio.Event()
        self.task = asyncio.create_task(self._visit(admission))

    async def _visit(self, admission: Admission) -> None:
        async with admission.slot(self.slot):
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
    admission = Admission(Limits(10), lambda: Room(1))
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
    admission = Admission(Limits(1), lambda: Room(1))
    visitors = [Visitor(admission), Visitor(admission)]
    await settle()
    with pytest.raises(Overloaded) as caught:
        async with admission.slot(Slot(1)):
            pass
    assert caught.value.retry_after_s >= 1
    for visitor in visitors:
        await visitor.leave()


async def test_a_vanished_client_leaves_the_queue() -> None:
    admission = Admission(Limits(10), lambda: Room(1))
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
    admission = Admission(Limits(10), lambda: Room(1))
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
    admission = Admission(Limits(10), lambda: Room(1))
    first, late = Visitor(admission), Visitor(admission, seconds=0.02)
    with pytest.raises(DeadlineExceeded):
        await late.task
    assert admission.num_queued == 0
    await first.leave()


async def test_a_heavy_request_waits_for_room_and_one_beyond_all_room_runs_alone() -> None:
    admission = Admission(Limits(10), lambda: Room(4))
    light, heavy = Visitor(admission, 3), Visitor(admission, 9)
    await settle()
    assert not heavy.inside
    await light.leave()
    await settle()
    assert heavy.inside
    await heavy.leave()


async def test_more_capacity_lets_waiting_requests_in() -> None:
    capacity = 1
    admission = Admission(Limits(10), lambda: Room(capacity))
    visitors = [Visitor(admission), Visitor(admission)]
    await settle()
    capacity = 2
    admission.wake()
    await settle()
    assert [v.inside for v in visitors] == [True, True]
    for visitor in visitors:
        await visitor.leave()


async def crowd(admission: Admission, *visitors: dict[str, Any]) -> list[Visitor]:
    made = [Visitor(admission, **fields) for fields in visitors]
    await settle()
    return made


async def order(admission: Admission, first: Visitor, waiting: list[Visitor]) -> list[int]:
    """The order in which those who wait get in, each after the one before has left."""
    came, inside = [], first
    for _ in waiting:
        await inside.leave()
        await settle()
        [inside] = [v for v in waiting if v.inside]
        came.append(waiting.index(inside))
    await inside.leave()
    return came


async def test_priorities_go_first_and_tenants_share() -> None:
    admission = Admission(Limits(99), lambda: Room(1))
    size = {"tokens": QUANTUM}
    first, *waiting = await crowd(
        admission, {}, *[{"tenant": "a", **size}] * 3, *[{"tenant": "b", **size}] * 2, {"priority": -1, **size}
    )
    assert await order(admission, first, waiting) == [5, 0, 3, 1, 4, 2]


async def test_what_requests_generate_counts_for_their_tenant() -> None:
    admission = Admission(Limits(99), lambda: Room(1))
    size = {"tokens": QUANTUM}
    first, *waiting = await crowd(
        admission, {"tenant": "a", **size}, *[{"tenant": "a", **size}] * 3, *[{"tenant": "b", **size}] * 3
    )
    first.slot.generated(2 * QUANTUM)
    assert await order(admission, first, waiting) == [3, 4, 0, 5, 1, 2]


async def test_a_flooded_queue_does_without_the_flood_and_not_without_the_others() -> None:
    admission = Admission(Limits(3), lambda: Room(1))
    first, *flood = await crowd(admission, {}, *[{"tenant": "flood"}] * 3)
    [other] = await crowd(admission, {"tenant": "other"})
    with pytest.raises(Overloaded):
        await flood[-1].task
    for visitor in (first, *flood[:2], other):
        await visitor.leave()


async def test_who_fits_once_the_one_before_was_refused_starts_at_once() -> None:
    """It waited for whatever happened next, though there was room and nobody was before it."""
    admission = Admission(Limits(1), lambda: Room(4))
    first, heavy = await crowd(admission, {"weight": 3}, {"weight": 2, "tokens": 90, "tenant": "flood"})
    [light] = await crowd(admission, {"tenant": "other"})
    with pytest.raises(Overloaded):
        await heavy.task
    assert light.inside and admission.num_queued == 0
    await first.leave()
    await light.leave()


async def test_the_queue_is_bounded_in_prompt_tokens_for_each_worker_that_computes_them() -> None:
    room = Room(1, num_prefill=2)
    admission = Admission(Limits(99, max_tokens=50), lambda: room)
    first, waiting, beyond = await crowd(admission, {}, {"tokens": 90}, {"tokens": 20})
    with pytest.raises(Overloaded):
        await beyond.task
    assert admission.queued_tokens == 90
    await first.leave()
    [huge] = await crowd(admission, {"tokens": 999})
    await waiting.leave()
    await huge.leave()


async def test_a_prompt_waits_until_those_before_it_are_computed() -> None:
    admission = Admission(Limits(99), lambda: Room(99, prompt_tokens=100))
    first, second, third = await crowd(admission, {"tokens": 90}, {"tokens": 90}, {"tokens": 90})
    assert [v.inside for v in (first, second, third)] == [True, True, False]
    first.slot.placed(5)  # the workers have nearly all of it
    await settle()
    assert third.inside
    [fourth] = await crowd(admission, {"tokens": 1})
    assert not fourth.inside
    second.slot.generated(1)
    await settle()
    assert fourth.inside
    for visitor in (first, second, third, fourth):
        await visitor.leave()
    assert vars(admission.load) == {"requests": 0, "sequences": 0, "uncomputed": 0, "entering": 0}


async def test_a_request_waits_for_room_for_its_kv() -> None:
    room = Room(99, kv_tokens=100, kv_pool=1000)
    admission = Admission(Limits(99), lambda: room)
    first, second = await crowd(admission, {"tokens": 59}, {"tokens": 59})
    assert not second.inside, "the workers do not say yet what the first one takes"
    first.slot.placed(59)
    await settle()
    assert second.inside
    second.slot.placed(59)
    room = Room(99, kv_tokens=0, kv_pool=1000)
    [third] = await crowd(admission, {"tokens": 2000})
    room = Room(99, kv_tokens=1000, kv_pool=1000)
    admission.wake()
    await settle()
    assert third.inside, "what no worker can ever hold is refused by a worker, not kept"
    for visitor in (first, second, third):
        await visitor.leave()


async def test_the_first_that_stands_for_free_blocks_goes_to_wait_at_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other routers, which know nothing of it, had each block that became free before there were enough."""
    monkeypatch.setattr(admission_module, "_STANDS_S", 0.0)
    room = Room(99, kv_tokens=0, kv_pool=1000, num_waiting=1)
    admission = Admission(Limits(99), lambda: room)
    running, first, second = await crowd(admission, {"tokens": 5}, {"tokens": 500}, {"tokens": 5})
    running.slot.placed(5)
    await settle()
    assert not first.inside, "somebody waits there already"
    room = replace(room, num_waiting=0)
    admission.wake()
    await settle()
    assert first.inside and not second.inside, "one at a time"
    first.slot.placed(500)
    await settle()
    assert second.inside
    for visitor in (running, first, second):
        await visitor.leave()


async def test_the_first_stands_a_while_for_free_blocks_before_it_goes() -> None:
    admission = Admission(Limits(99), lambda: Room(99, kv_tokens=0, kv_pool=1000))
    running, first = await crowd(admission, {"tokens": 5}, {"tokens": 500})
    running.slot.placed(5)
    await settle()
    assert not first.inside
    for visitor in (running, first):
        await visitor.leave()


async def test_who_does_not_decode_waits_for_nobodys_room_to_decode() -> None:
    """An embedding waited behind prompts that the decode workers had no blocks for; it does wait for its turn."""
    room = Room(1, prompt_tokens=200, kv_tokens=0, kv_pool=1000)
    admission = Admission(Limits(99), lambda: room)
    running, decodes = await crowd(admission, {"tokens": 100}, {"tokens": 50})
    first, second = await crowd(admission, {"weight": 0, "tokens": 500}, {"weight": 0, "tokens": 500})
    assert first.inside and not (decodes.inside or second.inside)
    room = Room(2, prompt_tokens=200, kv_tokens=1000, kv_pool=1000)
    await first.leave()
    await settle()
    assert decodes.inside and second.inside
    for visitor in (running, decodes, second):
        await visitor.leave()


async def test_a_request_that_cannot_begin_in_time_is_refused_at_once() -> None:
    admission = Admission(Limits(99), lambda: Room(1))
    visitors = await crowd(admission, {"tokens": 100}, {"tokens": 100}, *[{"tokens": 1000}] * 3)
    await asyncio.sleep(0.1)
    await visitors[0].leave()
    await settle()
    assert visitors[1].inside
    begun = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match="cannot begin in time"):  # about 1000 tokens a second, 3000 wait
        async with admission.slot(Slot(1, deadline=soon(1.5))):
            pass
    with pytest.raises(DeadlineExceeded, match="before it began"):
        async with admission.slot(Slot(1, deadline=soon(-1))):
            pass
    assert asyncio.get_running_loop().time() - begun < 1.5
    for visitor in visitors[1:]:
        await visitor.leave()
        await settle()


async def test_what_held_up_an_earlier_queue_refuses_nobody_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """One had waited for a minute behind a long answer: an hour later the third of a burst could not begin in time."""
    now = soon(0)
    monkeypatch.setattr("pagewire_router.admission._now", lambda: now)
    admission = Admission(Limits(99), lambda: Room(1))
    first, second = await crowd(admission, *[{"tokens": 100, "seconds": 1e6}] * 2)
    now += 60
    await first.leave()
    await settle()
    await second.leave()
    now += 3600
    burst = await crowd(admission, *[{"tokens": 100, "seconds": 3660 + 60}] * 9)
    assert not any(visitor.task.done() for visitor in burst)
    for visitor in burst:
        await visitor.leave()
        await settle()


async def test_when_to_come_back_follows_from_the_rate_at_which_the_queue_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, now = [], 0.0
    monkeypatch.setattr("pagewire_router.admission._now", lambda: now)
    for pause_s in (0.03, 0.1):
        admission = Admission(Limits(4), lambda: Room(1))
        far = {"seconds": 1e6}
        visitors = await crowd(admission, *[{"tokens": 1000}] * 2, *[{"tokens": 100_000, **far}] * 3)
        now += pause_s
        await visitors[0].leave()
        await settle()
        visitors += await crowd(admission, {"tokens": 1, **far})
        [refused] = await crowd(admission, {"tokens": 200_000, **far})
        with pytest.raises(Overloaded) as caught:
            await refused.task
        told.append(caught.value.retry_after_s)
        waiting = [visitor.task for visitor in visitors if not visitor.inside]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await visitors[1].leave()
    assert 1 < told[0] < told[1] <= 60


async def test_whatever_happens_nothing_stays_taken() -> None:
    """Random arrivals, departures, cancellations and refusals: at the end all counts are back at nothing."""
    rng = random.Random(7)
    room = Room(4, prompt_tokens=300, kv_tokens=500, kv_pool=900)
    admission = Admission(Limits(6, 900), lambda: room)
    visitors: list[Visitor] = []
    for _ in range(600):
        visitors = [v for v in visitors if not (v.task.done() and (v.task.cancelled() or v.task.exception() or True))]
        action = rng.random()
        if action < 0.45:
            visitors.append(
                Visitor(admission, rng.randint(0, 3), rng.choice([0.001, 5]), rng.randint(1, 400), rng.choice("abc"),
                        rng.choice([0, 0, 1]))
            )  # fmt: skip
        elif visitors:
            visitor = rng.choice(visitors)
            if action < 0.6:
                visitor.task.cancel()
            elif action < 0.75:
                visitor._go.set()
            elif visitor.inside:
                visitor.slot.placed(rng.randint(0, 400)) if action < 0.85 else visitor.slot.generated(5)
        if rng.random() < 0.6:
            await asyncio.sleep(0)
        if rng.random() < 0.02:
            await asyncio.sleep(0.002)
        assert min(vars(admission.load).values()) >= 0
        assert len(admission._passing) <= admission.num_queued
    for visitor in visitors:
        visitor._go.set()
    await asyncio.gather(*(v.task for v in visitors), return_exceptions=True)
    assert vars(admission.load) == {"requests": 0, "sequences": 0, "uncomputed": 0, "entering": 0}
    assert admission.num_queued == admission.queued_tokens == len(admission._passing) == 0
