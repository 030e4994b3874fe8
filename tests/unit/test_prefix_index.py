from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from fakes import RedisServer
from hypothesis import given
from hypothesis import strategies as st
from pagewire_core import block_events, prefix_index
from pagewire_core.block_events import (
    CLEARED,
    REMOVED,
    STORED,
    BlockEventPublisher,
    pack_event,
    stream_key,
    unpack_events,
)
from pagewire_core.prefix_index import IndexFollower, PrefixIndex, Snapshot
from pagewire_core.redis_link import open_redis

MODEL = b"m" * 32


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


BLOCKS = [block(i) for i in range(10)]


class Cache:
    """A worker's cache that publishes what happens to it."""

    def __init__(self, url: str, instance: str = "i1") -> None:
        self.hashes: set[bytes] = set()
        self.publisher = BlockEventPublisher(url, MODEL, "w", instance, lambda: sorted(self.hashes))

    def store(self, *hashes: bytes) -> None:
        self.hashes.update(hashes)
        self.publisher.stored(hashes)

    def remove(self, *hashes: bytes) -> None:
        self.hashes.difference_update(hashes)
        self.publisher.removed(hashes)

    async def snapshot(self, worker_id: str) -> Snapshot:
        return Snapshot(self.publisher.sequence, sorted(self.hashes))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def nobody(worker_id: str) -> Snapshot | None:
    return None


@contextlib.asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(c) for c in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results), results


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_match_ends_at_the_first_hole() -> None:
    index = PrefixIndex()
    index.join("w", "i", MODEL)
    index.join("empty", "i", MODEL)
    index.apply("w", 1, [(STORED, [block(0), block(1), block(3)])])
    assert index.match(BLOCKS) == {"w": 2}
    index.apply("w", 2, [(REMOVED, [block(0)])])
    assert index.match(BLOCKS) == {}


def test_events_that_were_applied_are_not_applied_again() -> None:
    index = PrefixIndex()
    index.join("w", "i", MODEL)
    index.apply("w", 1, [(STORED, [block(0)]), (REMOVED, [block(0)])])
    index.apply("w", 1, [(STORED, [block(0)])])
    assert index.num_blocks == 0
    index.apply("w", 3, [(STORED, [block(0)]), (CLEARED, []), (STORED, [block(1)])])
    assert index.num_blocks == 1


def test_a_new_incarnation_starts_empty() -> None:
    """After a restart on the same address an index kept placing requests on blocks that were gone."""
    index = PrefixIndex()
    index.join("w", "old", MODEL)
    index.load("w", "old", Snapshot(7, BLOCKS))
    index.join("w", "new", MODEL)
    assert index.num_blocks == 0
    assert not index.load("w", "old", Snapshot(8, BLOCKS))
    index.leave("w")
    assert index.worker_ids == []


@given(st.lists(st.tuples(st.sampled_from([STORED, REMOVED, CLEARED]), st.lists(st.sampled_from(BLOCKS)))))
def test_events_survive_packing(events: list[tuple[bytes, list[bytes]]]) -> None:
    packed = b"".join(pack_event(kind, hashes) for kind, hashes in events)
    assert list(unpack_events(packed)) == events
    if packed:
        with pytest.raises(ValueError, match="cut short"):
            list(unpack_events(packed[:-1]))


async def test_what_a_worker_stores_and_drops_is_known_soon(redis_server: RedisServer) -> None:
    cache, index = Cache(redis_server.url), PrefixIndex()
    follower = IndexFollower(redis_server.url, index, nobody)
    async with running(cache.publisher.run(), follower.run()):
        follower.joined("w", "i1", MODEL)
        cache.store(*BLOCKS[:4])
        await until(lambda: index.match(BLOCKS) == {"w": 4})
        cache.remove(block(3))
        await until(lambda: index.match(BLOCKS) == {"w": 3})
        cache.hashes.clear()
        cache.publisher.cleared()
        await until(lambda: index.match(BLOCKS) == {})
        assert follower.connected


async def test_a_worker_that_joins_late_is_known_by_its_snapshot(redis_server: RedisServer) -> None:
    cache, index = Cache(redis_server.url), PrefixIndex()
    cache.store(*BLOCKS)
    follower = IndexFollower(None, index, cache.snapshot)
    async with running(follower.run()):
        follower.joined("w", "i1", MODEL)
        await until(lambda: index.match(BLOCKS) == {"w": 10})


async def test_a_gap_is_mended_from_the_snapshot_in_redis(redis_server: RedisServer) -> None:
    cache, index = Cache(redis_server.url), PrefixIndex()
    async with running(cache.publisher.run()):
        cache.store(*BLOCKS[:5])
        await asyncio.sleep(0.15)
    redis = open_redis(redis_server.url)
    await redis.delete(stream_key(MODEL))
    await redis.aclose()
    follower = IndexFollower(redis_server.url, index, nobody)
    async with running(cache.publisher.run(), follower.run()):
        follower.joined("w", "i1", MODEL)
        await until(lambda: index.match(BLOCKS) == {"w": 5})


async def test_a_gap_without_snapshot_is_mended_by_the_worker_or_forgotten(redis_server: RedisServer) -> None:
    index = PrefixIndex()
    answers: list[Snapshot | None] = [None, Snapshot(9, BLOCKS[:3])]

    async def resync(worker_id: str) -> Snapshot | None:
        return answers.pop(0) if answers else None

    redis = open_redis(redis_server.url)
    follower = IndexFollower(redis_server.url, index, resync)

    async def event(first: int, number: int) -> None:
        fields: dict[Any, Any] = {"w": "w", "i": "i1", "s": first, "e": pack_event(STORED, [block(number)])}
        await redis.xadd(stream_key(MODEL), fields)

    async with running(follower.run()):
        follower.joined("w", "i1", MODEL)
        await until(lambda: len(answers) == 1)
        await redis.xadd(stream_key(MODEL), {"not": "ours"})
        await event(10, 3)
        await until(lambda: index.match(BLOCKS) == {"w": 4})
        await event(20, 0)
        await until(lambda: index.match(BLOCKS) == {"w": 1})
        assert index.num_blocks == 1
    await redis.aclose()


async def test_what_was_forgotten_is_asked_for_again(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that did not answer at that moment was never asked again: what it had before stayed unknown."""
    monkeypatch.setattr(prefix_index, "_REFRESH_S", 0.05)
    index, mended, answers = PrefixIndex(), list[str](), False

    async def resync(worker_id: str) -> Snapshot | None:
        return Snapshot(10, BLOCKS) if answers else None

    redis = open_redis(redis_server.url)
    follower = IndexFollower(redis_server.url, index, resync, mended.append)
    async with running(follower.run()):
        follower.joined("w", "i1", MODEL)
        fields: dict[Any, Any] = {"w": "w", "i": "i1", "s": 10, "e": pack_event(STORED, [block(0)])}
        await redis.xadd(stream_key(MODEL), fields)
        await until(lambda: mended == ["forgotten"] and index.match(BLOCKS) == {"w": 1})
        index.told("w", 10)
        answers = True
        await until(lambda: index.match(BLOCKS) == {"w": 10})
    await redis.aclose()


async def test_what_another_answer_has_told_meanwhile_is_not_forgotten(redis_server: RedisServer) -> None:
    """A worker may be asked twice, as it joins and for a gap; the second answer did not come, and undid the first."""
    index, mended, asked, answered = PrefixIndex(), list[str](), asyncio.Event(), asyncio.Event()

    async def resync(worker_id: str) -> Snapshot | None:
        if not asked.is_set():
            asked.set()
            await answered.wait()
            return Snapshot(10, BLOCKS)
        answered.set()
        await until(lambda: index.sequence_of("w") == 10)
        return None

    redis = open_redis(redis_server.url)
    follower = IndexFollower(redis_server.url, index, resync, mended.append)
    async with running(follower.run()):
        follower.joined("w", "i1", MODEL)
        await asked.wait()
        fields: dict[Any, Any] = {"w": "w", "i": "i1", "s": 10, "e": pack_event(STORED, [block(0)])}
        await redis.xadd(stream_key(MODEL), fields)
        await until(lambda: mended == ["worker"])
        assert index.match(BLOCKS) == {"w": 10}
    await redis.aclose()


async def test_events_of_an_earlier_incarnation_are_ignored(redis_server: RedisServer) -> None:
    old, new, index = Cache(redis_server.url, "old"), Cache(redis_server.url, "new"), PrefixIndex()
    follower = IndexFollower(redis_server.url, index, nobody)
    async with running(old.publisher.run()):
        old.store(*BLOCKS)
        await asyncio.sleep(0.15)
        old.store(*BLOCKS)
        await asyncio.sleep(0.15)
    async with running(new.publisher.run(), follower.run()):
        follower.joined("w", "new", MODEL)
        new.store(block(0))
        await until(lambda: index.match(BLOCKS) == {"w": 1})
        assert index.num_blocks == 1


async def test_the_index_heals_when_redis_comes_back(redis_server: RedisServer) -> None:
    """Events of the outage are lost with Redis' memory; only the numbers tell that they were there."""
    cache, index = Cache(redis_server.url), PrefixIndex()
    follower = IndexFollower(redis_server.url, index, nobody)
    async with running(cache.publisher.run(), follower.run()):
        follower.joined("w", "i1", MODEL)
        cache.store(*BLOCKS[:2])
        await until(lambda: index.match(BLOCKS) == {"w": 2})
        redis_server.kill()
        cache.store(*BLOCKS[2:6])
        cache.remove(block(5))
        await until(lambda: not follower.connected)
        assert index.match(BLOCKS) == {"w": 2}
        redis_server.start()
        await until(lambda: index.match(BLOCKS) == {"w": 5})
        assert follower.connected


async def test_more_events_than_the_buffer_holds_become_a_snapshot(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_events, "_MAX_PENDING_BYTES", 100)
    cache, index = Cache(redis_server.url), PrefixIndex()
    follower = IndexFollower(redis_server.url, index, nobody)
    async with running(cache.publisher.run(), follower.run()):
        follower.joined("w", "i1", MODEL)
        for value in BLOCKS:
            cache.store(value)
        await until(lambda: index.match(BLOCKS) == {"w": 10})


async def test_workers_are_asked_directly_while_redis_is_away(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_index, "_REFRESH_S", 0.05)
    redis_server.kill()
    cache, index = Cache(redis_server.url), PrefixIndex()
    follower = IndexFollower(redis_server.url, index, cache.snapshot)
    async with running(follower.run()):
        follower.joined("w", "i1", MODEL)
        await asyncio.sleep(0.02)
        cache.store(*BLOCKS[:3])
        await until(lambda: index.match(BLOCKS) == {"w": 3})


def test_what_is_known_counts_less_and_less_while_the_worker_tells_of_more() -> None:
    index = PrefixIndex(clock := Clock())
    index.join("w", "i", MODEL)
    index.apply("w", 1, [(STORED, BLOCKS)])
    index.told("w", 1)
    clock.now += 500
    assert index.match(BLOCKS) == {"w": 10} and index.oldest_s == 0, "nothing happened there: nothing is missing"
    index.told("w", 3)
    for age, expected in ((0, 10), (30, 10), (31, 9), (60, 5), (84, 1), (90, None), (1000, None)):
        clock.now = 1500 + age
        index.told("w", 4)
        assert index.match(BLOCKS).get("w") == expected, age
        assert index.oldest_s == age
    index.apply("w", 2, [(STORED, [])])
    assert index.match(BLOCKS) == {}
    index.apply("w", 3, [(STORED, [])])
    assert index.match(BLOCKS) == {"w": 10} and index.oldest_s == 0
    index.told("w", 4)
    clock.now += 40
    index.load("w", "i", Snapshot(9, BLOCKS[:3]))
    assert index.match(BLOCKS) == {"w": 3} and index.oldest_s == 0


def test_what_was_sent_to_a_worker_counts_while_it_cannot_be_followed() -> None:
    index = PrefixIndex(clock := Clock())
    index.join("w", "i", MODEL)
    index.placed("w", BLOCKS[:2])
    clock.now += 1
    index.told("w", 7)
    index.placed("w", BLOCKS[:4])
    clock.now += 20
    assert index.match(BLOCKS) == {}, "for now it is known what it has"
    clock.now += 100
    assert index.match(BLOCKS) == {"w": 4}
    index.told("w", 9)
    index.load("w", "i", Snapshot(9, []))
    clock.now += 100
    assert index.match(BLOCKS) == {}
    index.join("w", "j", MODEL)
    index.told("w", 1)
    clock.now += 100
    assert index.match(BLOCKS) == {}, "another process has nothing of what was sent to the one before"


def test_of_what_was_sent_to_a_worker_the_latest_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "_MAX_PLACED", 3)
    index = PrefixIndex(clock := Clock())
    index.join("w", "i", MODEL)
    index.told("w", 1)
    clock.now += 100
    for blocks in (BLOCKS[:3], BLOCKS[:1], BLOCKS[3:4]):
        index.placed("w", blocks)
    assert index.match(BLOCKS[:2]) == {"w": 1} and index.match(BLOCKS[1:2]) == {}
    assert index.match(BLOCKS[2:4]) == {"w": 2}


def test_a_worker_that_does_not_say_how_many_events_there_were_is_taken_at_its_word() -> None:
    index = PrefixIndex(clock := Clock())
    index.join("w", "i", MODEL)
    index.apply("w", 1, [(STORED, BLOCKS)])
    index.told("w", 0)
    clock.now += 500
    assert index.match(BLOCKS) == {"w": 10} and index.is_behind("w") is None


@given(st.lists(st.tuples(st.sampled_from(["event", "lose", "told", "snapshot", "wait"]), st.integers(1, 40))))
def test_whatever_is_lost_a_snapshot_makes_it_right(steps: list[tuple[str, int]]) -> None:
    """A worker's cache, its events of which some are lost, and what it tells: exact whenever nothing is missing."""
    index = PrefixIndex(clock := Clock())
    index.join("w", "i", MODEL)
    held: set[bytes] = set()
    sequence, lost = 0, False
    for what, number in steps:
        if what in ("event", "lose"):
            sequence += 1
            value = block(number % 10)
            kind = REMOVED if value in held else STORED
            held ^= {value}
            lost = lost or what == "lose"
            if not lost:
                index.apply("w", sequence, [(kind, [value])])
        elif what == "told":
            index.told("w", sequence)
        elif what == "snapshot":
            index.load("w", "i", Snapshot(sequence, sorted(held)))
            lost = False
        else:
            clock.now += number
        if not lost:
            assert index.oldest_s == 0
            assert index.match(BLOCKS).get("w", 0) == next((i for i, b in enumerate(BLOCKS) if b not in held), 10)


@pytest.mark.parametrize("outage", ["killed", "paused"])
async def test_without_redis_the_index_goes_down_level_by_level_and_comes_back(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, outage: str
) -> None:
    monkeypatch.setattr(prefix_index, "_REFRESH_S", 0.05)
    cache, index = Cache(redis_server.url), PrefixIndex(clock := Clock())
    reachable = True
    mended: list[str] = []

    async def resync(worker_id: str) -> Snapshot | None:
        return await cache.snapshot(worker_id) if reachable else None

    follower = IndexFollower(redis_server.url, index, resync, mended.append)
    assert follower.level == 3
    async with running(cache.publisher.run(), follower.run()):
        follower.joined("w", "i1", MODEL)
        cache.store(*BLOCKS[:4])
        await until(lambda: index.match(BLOCKS) == {"w": 4} and follower.level == 0)
        redis_server.kill() if outage == "killed" else redis_server.pause()
        await until(lambda: follower.level == 1)
        cache.store(*BLOCKS[4:6])
        index.told("w", cache.publisher.sequence)
        await until(lambda: index.match(BLOCKS) == {"w": 6})  # asked of the worker
        reachable = False
        cache.store(block(6))
        index.told("w", cache.publisher.sequence)
        clock.now += 60
        assert follower.level == 2 and index.match(BLOCKS) == {"w": 3}
        redis_server.start() if outage == "killed" else redis_server.resume()
        await until(lambda: index.match(BLOCKS) == {"w": 7})
        assert follower.level == 0
        assert "forgotten" not in mended


async def test_a_worker_whose_events_do_not_come_is_asked_while_redis_is_there(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis answered the router and not the worker: nobody noticed that the events had ended."""
    monkeypatch.setattr(prefix_index, "_REFRESH_S", 0.05)
    cache, index = Cache(redis_server.url), PrefixIndex()
    follower = IndexFollower(redis_server.url, index, cache.snapshot)
    async with running(follower.run()):
        follower.joined("w", "i1", MODEL)
        await until(lambda: follower.level == 0)
        cache.store(*BLOCKS[:5])
        assert index.match(BLOCKS) == {}
        index.told("w", cache.publisher.sequence)
        await until(lambda: index.match(BLOCKS) == {"w": 5})


async def test_a_redis_that_comes_back_empty_loses_nothing(redis_server: RedisServer) -> None:
    cache, index, mended = Cache(redis_server.url), PrefixIndex(), list[str]()
    follower = IndexFollower(redis_server.url, index, nobody, mended.append)
    async with running(cache.publisher.run(), follower.run()):
        follower.joined("w", "i1", MODEL)
        cache.store(*BLOCKS[:3])
        await until(lambda: index.match(BLOCKS) == {"w": 3})
        for number in range(3, 6):
            redis_server.kill()
            cache.store(block(number))
            redis_server.start()
            await until(lambda expected=number + 1: index.match(BLOCKS) == {"w": expected})
        redis = open_redis(redis_server.url)
        await redis.flushall()
        await redis.aclose()
        cache.store(*BLOCKS[6:])
        await until(lambda: index.match(BLOCKS) == {"w": 10})
    assert set(mended) <= {"snapshot"}
