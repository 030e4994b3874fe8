"""What a worker's prefix cache gained and lost, as a stream of numbered events in Redis (writer side).

    pd:{fp12}:ev           stream, about 100 000 entries: w worker id, i incarnation, s number of the
                           first event, e packed events
    pd:{fp12}:snap:{wid}   hash, lives 15 min: instance, sequence, hashes (all, 16 bytes each)

fp12 is the first 12 hex digits of the fingerprint. A packed event is a kind byte, a u32le count and
that many hashes of 16 bytes. Numbers start at 1 and have no gaps within an incarnation, so a reader
knows when it lost something; a snapshot includes at least the events up to its `sequence`.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pagewire_core import faults
from pagewire_core.redis_client import Redis
from pagewire_core.redis_link import RedisLink

STORED, REMOVED, CLEARED, MARK = b"s", b"r", b"c", b"m"
HASH_BYTES = 16
_BATCH_S = 0.03
_SNAPSHOT_EVERY_S = 60.0
_SNAPSHOT_LIFETIME_S = 900
_MAX_STREAM = 100_000
_MAX_PENDING_BYTES = 4 << 20

Event = tuple[bytes, list[bytes]]


def stream_key(fingerprint: bytes) -> str:
    return f"pd:{fingerprint.hex()[:12]}:ev"


def snapshot_key(fingerprint: bytes, worker_id: str) -> str:
    return f"pd:{fingerprint.hex()[:12]}:snap:{worker_id}"


def pack_event(kind: bytes, hashes: Sequence[bytes]) -> bytes:
    return kind + struct.pack("<I", len(hashes)) + b"".join(hashes)


def unpack_events(data: bytes) -> Iterator[Event]:
    """The events in `data`, in order. Raises ValueError if it is not made of whole events."""
    at = 0
    while at < len(data):
        if len(data) < at + 5:
            raise ValueError("a block event is cut short")
        kind, (count,) = data[at : at + 1], struct.unpack_from("<I", data, at + 1)
        at += 5
        if kind not in (STORED, REMOVED, CLEARED, MARK):
            raise ValueError("a block event of an unknown kind")
        if len(data) < at + count * HASH_BYTES:
            raise ValueError("a block event is cut short")
        yield kind, split_hashes(data[at : at + count * HASH_BYTES])
        at += count * HASH_BYTES


def read_sequence(text: bytes) -> int:
    """An event's number. Raises ValueError for what no writer can have counted up to."""
    if len(text) > 19 or not text.isdigit():
        raise ValueError("an event's number is no number")
    return int(text)


def split_hashes(data: bytes) -> list[bytes]:
    """Raises ValueError if it is not made of whole hashes."""
    if len(data) % HASH_BYTES:
        raise ValueError("hashes are cut short")
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


class BlockEventPublisher:
    """Publishes one worker's block events.

    `stored`, `removed` and `cleared` may be called from any thread and never wait; call them after the
    change. `snapshot` is called on the event loop's thread and returns every cached hash. Events of the
    time that Redis is away are dropped: the next thing it gets then is a snapshot.
    """

    def __init__(
        self,
        redis_url: str,
        fingerprint: bytes,
        worker_id: str,
        instance: str,
        snapshot: Callable[[], Sequence[bytes]],
    ) -> None:
        self._link = RedisLink(redis_url, "block events")
        self._stream = stream_key(fingerprint)
        self._snapshot_key = snapshot_key(fingerprint, worker_id)
        self._worker_id = worker_id
        self._instance = instance
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._first_pending = 1  # number of the first pending event
        self._sequence = 0
        self._dirty = True  # readers cannot follow by events alone: write a snapshot
        self._tell: Callable[[], object] = lambda: None  # that something is pending

    @property
    def sequence(self) -> int:
        """Number of the last event; read it before taking a snapshot that is to include it."""
        return self._sequence

    def stored(self, hashes: Sequence[bytes]) -> None:
        self._note(STORED, hashes)

    def removed(self, hashes: Sequence[bytes]) -> None:
        self._note(REMOVED, hashes)

    def cleared(self) -> None:
        self._note(CLEARED, ())

    async def run(self) -> None:
        """Publishes until cancelled."""
        await self._link.run(self._publish)

    def _note(self, kind: bytes, hashes: Sequence[bytes]) -> None:
        packed = pack_event(kind, hashes)
        with self._lock:
            self._sequence += 1
            if not self._pending:
                self._tell()
            if len(self._pending) + len(packed) > _MAX_PENDING_BYTES:
                self._drop_pending()
            else:
                self._pending += packed

    def _drop_pending(self) -> None:
        self._pending.clear()
        self._first_pending = self._sequence + 1
        self._dirty = True

    def _take_pending(self) -> tuple[int, bytes]:
        with self._lock:
            first, packed = self._first_pending, bytes(self._pending)
            self._pending.clear()
            self._first_pending = self._sequence + 1
        return first, packed

    async def _publish(self, redis: Redis) -> None:
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: there is nobody to be told
                loop.call_soon_threadsafe(news.set)

        with self._lock:
            self._tell = tell
            self._drop_pending()  # what was being sent when Redis went away may have arrived or not
        snapshot_at = 0.0
        while True:
            news.clear()
            if self._dirty or time.monotonic() - snapshot_at > _SNAPSHOT_EVERY_S:
                await self._write_snapshot(redis)
                snapshot_at = time.monotonic()
                self._link.alive()
            first, packed = self._take_pending()
            if packed:
                await self._add(redis, first, packed)
                self._link.alive()
            await asyncio.sleep(_BATCH_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(snapshot_at + _SNAPSHOT_EVERY_S - time.monotonic()):
                    await news.wait()

    async def _write_snapshot(self, redis: Redis) -> None:
        was_dirty, self._dirty = self._dirty, False
        sequence = self._sequence  # before the snapshot: what happens in between is told twice, not never
        fields: dict[Any, Any] = {
            "instance": self._instance,
            "sequence": sequence,
            "hashes": b"".join(self._snapshot()),
        }
        pipe = redis.pipeline(transaction=True)
        pipe.hset(self._snapshot_key, mapping=fields)
        pipe.expire(self._snapshot_key, _SNAPSHOT_LIFETIME_S)
        await pipe.execute()
        if was_dirty:
            self._note(MARK, ())  # an event, so that a reader that missed some notices now

    async def _add(self, redis: Redis, first: int, packed: bytes) -> None:
        fields: dict[Any, Any] = {"w": self._worker_id, "i": self._instance, "s": first, "e": packed}
        if faults.point("redis-write") == "drop":
            return
        await redis.xadd(self._stream, fields, maxlen=_MAX_STREAM, approximate=True)
