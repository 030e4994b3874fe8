"""Which worker holds which blocks: the router's replica in memory, and the task that feeds it.

Only incarnations that the router knows to be alive are held (`join`, `leave`): what a dead process had
is gone the moment its successor joins. Workers say on their Stats stream how many events there were, so that it is
known what is missing, whatever Redis does. The replica is advisory. It may lack blocks and, while Redis is
away, may hold some that are gone; a wrong answer costs time, never a wrong token.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from pagewire_core.block_events import (
    CLEARED,
    REMOVED,
    STORED,
    Event,
    read_sequence,
    snapshot_key,
    split_hashes,
    stream_key,
    unpack_events,
)
from pagewire_core.redis_client import Redis
from pagewire_core.redis_link import RedisLink

log = structlog.get_logger(__name__)

_READ_COUNT = 500
_READ_BLOCK_MS = 300
_REFRESH_S = 10.0  # how often workers are asked directly of whom events do not come
STALE_S, WORTHLESS_S = 30.0, 90.0
_MAX_PLACED = 65_536  # hashes for each worker


@dataclass(frozen=True)
class Snapshot:
    """Every block hash of a worker; includes at least the events up to `sequence`."""

    sequence: int
    hashes: Sequence[bytes]


# Asks a worker itself; None if it does not answer.
Resync = Callable[[str], Awaitable[Snapshot | None]]


@dataclass
class _Holding:
    instance: str
    fingerprint: bytes
    sequence: int = 0  # number of the last event applied
    hashes: set[bytes] = field(default_factory=set)
    told: int = 0  # number of the last event that the worker says there is
    behind: tuple[int, float] | None = None  # the first event that it told of and that did not come; when it told
    placed: OrderedDict[bytes, float] = field(default_factory=OrderedDict)  # what we sent to it, and when

    def age_s(self, now: float) -> float:
        return now - self.behind[1] if self.behind else 0.0


class PrefixIndex:
    """Block hashes by worker. `clock` is in seconds.

    What is known of a worker is complete while it has the last event that the worker tells of. If it stays
    incomplete for long, it counts less and less: fully for STALE_S, then falling to nothing at WORTHLESS_S. What was
    sent to the worker meanwhile counts on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._holdings: dict[str, _Holding] = {}
        self._clock = clock

    def join(self, worker_id: str, instance: str, fingerprint: bytes) -> None:
        """A worker is there and holds nothing that we know of; an earlier incarnation's blocks are forgotten."""
        self._holdings[worker_id] = _Holding(instance, fingerprint)

    def leave(self, worker_id: str) -> None:
        self._holdings.pop(worker_id, None)

    def told(self, worker_id: str, sequence: int) -> None:
        """The worker itself says that event number `sequence` was its last; 0 where it does not say."""
        holding = self._holdings.get(worker_id)
        if holding is not None:
            holding.told = sequence
            if holding.behind is None and holding.sequence < sequence:
                holding.behind = sequence, self._clock()

    def placed(self, worker_id: str, hashes: Sequence[bytes]) -> None:
        """The worker will soon hold these: a prompt was sent to it."""
        holding = self._holdings.get(worker_id)
        if holding is None:
            return
        now = self._clock()
        for value in hashes:
            holding.placed[value] = now
            holding.placed.move_to_end(value)
        while len(holding.placed) > _MAX_PLACED:
            holding.placed.popitem(last=False)

    def match(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Worker -> how many of the leading `hashes` it holds without a hole; workers with none are left out."""
        now = self._clock()
        return {w: n for w, holding in self._holdings.items() if (n := _matched(hashes, holding, now))}

    def age_s(self, worker_id: str) -> float:
        """For how long what is known of a worker has been incomplete."""
        holding = self._holdings.get(worker_id)
        return holding.age_s(self._clock()) if holding else 0.0

    @property
    def oldest_s(self) -> float:
        """The greatest of all ages."""
        now = self._clock()
        return max((holding.age_s(now) for holding in self._holdings.values()), default=0.0)

    def is_behind(self, worker_id: str) -> bool | None:
        """Whether something of a worker is missing; None: it does not say how many events there were."""
        holding = self._holdings.get(worker_id)
        return holding.behind is not None if holding and holding.told else None

    @property
    def num_blocks(self) -> int:
        return sum(len(h.hashes) for h in self._holdings.values())

    @property
    def worker_ids(self) -> list[str]:
        return list(self._holdings)

    @property
    def fingerprints(self) -> set[bytes]:
        return {h.fingerprint for h in self._holdings.values()}

    def fingerprint_of(self, worker_id: str) -> bytes | None:
        holding = self._holdings.get(worker_id)
        return holding.fingerprint if holding else None

    def instance_of(self, worker_id: str) -> str | None:
        holding = self._holdings.get(worker_id)
        return holding.instance if holding else None

    def knows(self, worker_id: str, instance: str) -> bool:
        return self.instance_of(worker_id) == instance

    def sequence_of(self, worker_id: str) -> int:
        """Number of the last event applied for a worker that is known."""
        return self._holdings[worker_id].sequence

    def load(self, worker_id: str, instance: str, snapshot: Snapshot) -> bool:
        """Replaces what is known of a worker, unless that is newer or of another incarnation."""
        if not self.knows(worker_id, instance) or snapshot.sequence < self.sequence_of(worker_id):
            return False
        holding = self._holdings[worker_id]
        holding.hashes = set(snapshot.hashes)
        self._reached(holding, snapshot.sequence)
        return True

    def forget(self, worker_id: str, sequence: int) -> None:
        """Drops the blocks of a worker whose events up to `sequence` are lost."""
        holding = self._holdings[worker_id]
        holding.hashes = set()
        self._reached(holding, sequence)

    def _reached(self, holding: _Holding, sequence: int) -> None:
        holding.sequence = sequence
        if holding.behind is not None and holding.behind[0] <= sequence:
            holding.behind = None

    def apply(self, worker_id: str, first: int, events: Iterable[Event]) -> None:
        """Applies events numbered from `first` on; those applied before are skipped. `first` must leave no gap."""
        holding = self._holdings[worker_id]
        for number, (kind, hashes) in enumerate(events, start=first):
            if number <= holding.sequence:
                continue
            self._reached(holding, number)
            if kind == STORED:
                holding.hashes.update(hashes)
            elif kind == REMOVED:
                holding.hashes.difference_update(hashes)
            elif kind == CLEARED:
                holding.hashes.clear()


def _matched(hashes: Sequence[bytes], holding: _Holding, now: float) -> int:
    age_s = holding.age_s(now)
    if age_s <= STALE_S:
        return _leading(hashes, holding.hashes)
    known = int(_leading(hashes, holding.hashes) * max(0.0, WORTHLESS_S - age_s) / (WORTHLESS_S - STALE_S))
    since = now - age_s
    ours = next((i for i, h in enumerate(hashes) if holding.placed.get(h, -math.inf) < since), len(hashes))
    return max(known, ours)


def _leading(hashes: Sequence[bytes], held: Container[bytes]) -> int:
    for count, value in enumerate(hashes):
        if value not in held:
            return count
    return len(hashes)


class IndexFollower:
    """Keeps a PrefixIndex in step with the workers.

    Events come from Redis. A gap in a worker's numbers is mended from its snapshot in Redis, else by
    asking the worker (`resync`); `mended` is told how. A worker that joins is asked at once, and every 10 s
    while its events do not come, or after some were lost and it did not answer. `redis_url` None: there is
    no Redis at all.
    """

    def __init__(
        self,
        redis_url: str | None,
        index: PrefixIndex,
        resync: Resync,
        mended: Callable[[str], None] = lambda how: None,
    ) -> None:
        self._link = RedisLink(redis_url, "prefix index") if redis_url else None
        self._index = index
        self._resync = resync
        self._mended = mended
        self._was_connected = False
        self._positions: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lacking: set[str] = set()  # workers of which something was lost that no event will tell again

    @property
    def connected(self) -> bool:
        return self._link is not None and self._link.connected

    @property
    def level(self) -> int:
        """How far the index does without Redis.

        0: it follows events. 1: Redis is away, and all is known nevertheless. 2: it is away, and something has been
        missing for long. 3: Redis was never there; workers are asked.
        """
        if self.connected:
            return 0
        if not self._was_connected:
            return 3
        return 2 if self._index.oldest_s > STALE_S else 1

    def joined(self, worker_id: str, instance: str, fingerprint: bytes) -> None:
        """A worker is there: starts to follow it."""
        self._index.join(worker_id, instance, fingerprint)
        task = asyncio.create_task(self._ask(worker_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def left(self, worker_id: str) -> None:
        self._index.leave(worker_id)
        self._lacking.discard(worker_id)

    async def run(self) -> None:
        """Follows until cancelled."""
        refresh = asyncio.create_task(self._refresh())
        try:
            if self._link is not None:
                await self._link.run(self._follow)
            await refresh
        finally:
            for task in (refresh, *self._tasks):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            for worker_id in self._index.worker_ids:
                if worker_id in self._lacking:
                    missing = True
                elif self.connected:
                    missing = self._index.age_s(worker_id) >= _REFRESH_S
                else:
                    missing = self._index.is_behind(worker_id) is not False
                if missing:
                    await self._ask(worker_id)

    async def _ask(self, worker_id: str) -> None:
        instance = self._index.instance_of(worker_id)
        snapshot = await self._resync(worker_id)
        if snapshot is not None and instance is not None and self._index.load(worker_id, instance, snapshot):
            self._lacking.discard(worker_id)

    async def _follow(self, redis: Redis) -> None:
        self._positions.clear()  # a Redis that came back may number its entries anew; events carry their own numbers
        while True:
            keys = {stream_key(f) for f in self._index.fingerprints}
            for key in keys - self._positions.keys():
                self._positions[key] = "0"
            if not keys:
                await redis.ping()
                self._link_alive()
                await asyncio.sleep(_READ_BLOCK_MS / 1000)
                continue
            positions: dict[Any, Any] = {k: self._positions[k] for k in keys}
            answer = await redis.xread(positions, count=_READ_COUNT, block=_READ_BLOCK_MS)
            self._link_alive()
            for key, entries in _entries(answer):
                for entry_id, fields in entries:
                    try:
                        await self._take(redis, fields)
                    except (KeyError, TypeError, ValueError) as error:  # not written by us: no reason to stop following
                        log.warning("prefix index skipped a foreign entry", stream=key, error=str(error))
                    self._positions[key] = entry_id

    def _link_alive(self) -> None:
        assert self._link is not None
        self._was_connected = True
        self._link.alive()

    async def _take(self, redis: Redis, fields: dict[bytes, bytes]) -> None:
        worker_id, instance, first = fields[b"w"].decode(), fields[b"i"].decode(), read_sequence(fields[b"s"])
        if not self._index.knows(worker_id, instance):
            return
        events = list(unpack_events(fields[b"e"]))
        if first > self._index.sequence_of(worker_id) + 1:
            await self._mend(redis, worker_id, instance, first)
            if not self._index.knows(worker_id, instance):
                return  # it left meanwhile
        self._index.apply(worker_id, first, events)

    async def _mend(self, redis: Redis, worker_id: str, instance: str, first: int) -> None:
        """Closes the gap before event `first`."""
        log.info("prefix index lost events; reading a snapshot", worker_id=worker_id)
        how, snapshot = "snapshot", await self._stored_snapshot(redis, worker_id, instance)
        if snapshot is None or snapshot.sequence < first - 1:
            how, snapshot = "worker", await self._resync(worker_id)
        if snapshot is not None and snapshot.sequence >= first - 1:
            self._index.load(worker_id, instance, snapshot)
        elif self._index.knows(worker_id, instance) and self._index.sequence_of(worker_id) < first - 1:
            how = "forgotten"
            self._index.forget(worker_id, first - 1)
            self._lacking.add(worker_id)
        self._mended(how)

    async def _stored_snapshot(self, redis: Redis, worker_id: str, instance: str) -> Snapshot | None:
        fingerprint = self._index.fingerprint_of(worker_id)
        if fingerprint is None:
            return None
        key = snapshot_key(fingerprint, worker_id)
        row: Any = await redis.hmget(key, "instance", "sequence", "hashes")
        stored_instance, sequence, packed = row
        if None in row or stored_instance != instance.encode():
            return None
        try:
            return Snapshot(read_sequence(sequence), split_hashes(packed))
        except ValueError:  # not written by us: the worker itself is asked
            return None


def _entries(answer: Any) -> Iterable[tuple[str, list[tuple[str, dict[bytes, bytes]]]]]:
    """XREAD's answer, which is a list of pairs in RESP2 and a dict in RESP3 (with one more list around it)."""
    pairs = answer.items() if isinstance(answer, dict) else answer or []
    for key, entries in pairs:
        flat = entries[0] if entries and isinstance(entries[0], list) else entries
        yield key.decode(), [(entry_id.decode(), fields) for entry_id, fields in flat if fields]
