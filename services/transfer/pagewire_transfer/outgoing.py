"""One transfer as the prefill worker sees it. Lives on the event loop; the pair moves its chunks."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from pagewire.v1 import common_pb2 as pb
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Cancelled, DeadlineExceeded, Incompatible, PagewireError, Unavailable
from pagewire_core.tracing import NOWHERE, Span

from pagewire_transfer.chunking import ChunkPlan
from pagewire_transfer.lane_thread import settled
from pagewire_transfer.wire import ChunkRange, root_checksum


@dataclass(frozen=True)
class SendStats:
    """What one transfer moved.

    transfer_us: time in which something was ready to be sent or on its way. overlap: the share of it that had passed
    when `seal` was called, and so was hidden behind the computation. tail_us: from then to the end.
    wire_us: time in which at least one chunk was on its way.
    """

    bytes: int
    chunks: int
    lane: str
    transfer_us: int
    resent: int
    wire_us: int
    overlap: float
    tail_us: int


class _Stopwatch:
    """Seconds in which it was on."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._since_s: float | None = None

    def turn(self, on: bool) -> None:
        now = time.monotonic()
        if on and self._since_s is None:
            self._since_s = now
        elif not on and self._since_s is not None:
            self._total_s += now - self._since_s
            self._since_s = None

    @property
    def seconds(self) -> float:
        return self._total_s + (0.0 if self._since_s is None else time.monotonic() - self._since_s)


class Port(Protocol):
    """What a transfer needs of its pair."""

    lane_name: str

    def post(self, request: kv.ConnectRequest) -> None:
        """Sends a control message, in order."""

    def wake(self) -> None:
        """Some transfer may have a chunk to send."""

    def ended(self, outgoing: Outgoing) -> None:
        """The transfer has ended, one way or another."""

    def fail(self, error: PagewireError) -> None:
        """The peer is of no use any more."""


class Outgoing:
    """The sending side of a transfer; made by KvSender.open.

    Ends once: by a `seal` that returns, by `abort`, by the peer's Abort, or with its pair.
    """

    def __init__(self, port: Port, transfer_id: bytes, plan: ChunkPlan, timeout_s: float, span: Span = NOWHERE) -> None:
        self.transfer_id = transfer_id
        self._span = span
        self.gathering: Future[Any] | None = None  # set by the pair
        self._port = port
        self._plan = plan
        self._timeout_s = timeout_s
        self._window = 0
        self._granted = asyncio.Event()
        self._ended = asyncio.Event()
        self._error: PagewireError | None = None
        self._inflight: dict[int, ChunkRange] = {}
        self._resend: deque[int] = deque()
        self._resent: set[int] = set()
        self._checksums: list[int] = []
        self._bytes = 0
        self._first_tokens: Sequence[pb.SampledToken] | None = None
        self._seal_sent = False
        self._busy, self._wire = _Stopwatch(), _Stopwatch()
        self._hidden_s: float | None = None  # of the busy time, when all was computed
        self._sealing_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._progress_s = time.monotonic()
        self._timer = self._loop.call_later(timeout_s, self._watch)

    @property
    def error(self) -> PagewireError | None:
        """Why the transfer has failed, if it has."""
        return self._error

    def extend(self, final: int, ahead: tuple[int, int] = (0, 0)) -> None:
        """Tokens before `final` may be sent, and those before ahead[0] in the layers before ahead[1].

        Never blocks; nothing happens after the end.
        """
        if not self._ended.is_set():
            self._plan.extend(final, ahead)
            self._note_busy()
            self._port.wake()

    async def seal(self, first_tokens: Sequence[pb.SampledToken]) -> SendStats:
        """All tokens are final: sends the rest and returns when the peer has verified all of it.

        Raises the PagewireError that ended the transfer. Being cancelled aborts it.
        """
        self._hidden_s, self._sealing_s = self._busy.seconds, time.monotonic()
        self.extend(self._plan.end)
        self._first_tokens = first_tokens
        self._seal_if_complete()
        try:
            await self._ended.wait()
        except asyncio.CancelledError:
            self.abort(Cancelled("the transfer was cancelled"))
            raise
        if self._error is not None:
            raise self._error
        return self.stats()

    def abort(self, error: PagewireError) -> None:
        """Ends the transfer and tells the peer why. Idempotent; no gather starts after it (see `closed`)."""
        if not self._ended.is_set():
            self._port.post(kv.ConnectRequest(abort=kv.Abort(transfer_id=self.transfer_id, error=error.to_proto())))
            self.fail(error)

    async def closed(self) -> None:
        """Returns when the transfer has ended and no gather for it runs or will run."""
        await self._ended.wait()
        if self.gathering is not None:
            await settled(self.gathering)

    def stats(self) -> SendStats:
        busy_s, hidden_s = self._busy.seconds, self._hidden_s or 0.0
        return SendStats(
            bytes=self._bytes,
            chunks=len(self._checksums),
            lane=self._port.lane_name,
            transfer_us=int(busy_s * 1e6),
            resent=len(self._resent),
            wire_us=int(self._wire.seconds * 1e6),
            overlap=hidden_s / busy_s if busy_s else 0.0,
            tail_us=int((self._progress_s - self._sealing_s) * 1e6) if self._hidden_s is not None else 0,
        )

    # What the pair calls.

    async def granted(self) -> None:
        """Returns when the peer has bound its pages; raises what ended the transfer instead."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._granted.wait()
        except TimeoutError:
            self.abort(DeadlineExceeded(f"the decode worker did not grant room within {self._timeout_s:.1f} s"))
        except asyncio.CancelledError:
            self.abort(Cancelled("the transfer was cancelled"))
            raise
        if self._error is not None:
            raise self._error

    def grant(self, window: int) -> None:
        """Raises Incompatible for a window in which nothing would ever be sent, and nothing be missed."""
        if not window:
            raise Incompatible("the decode worker granted room for no chunk")
        self._window = window
        self._note_busy()
        self._granted.set()
        self._port.wake()

    def next_chunk(self) -> tuple[int, ChunkRange] | None:
        """The chunk to send next, if the window and what is final allow one."""
        if self._ended.is_set():
            return None
        if self._resend:
            seq = self._resend.popleft()
        elif self._plan.has_next and len(self._inflight) < self._window:
            seq = len(self._checksums)
            self._checksums.append(0)
            self._inflight[seq] = self._plan.take()
        else:
            return None
        self._note_busy()
        self._touch()
        return seq, self._inflight[seq]

    def announced(self, seq: int, num_bytes: int, checksum: int) -> None:
        if seq not in self._resent:
            self._bytes += num_bytes
        self._checksums[seq] = checksum
        self._touch()

    def acknowledge(self, seq: int, resend: bool) -> None:
        """Raises Incompatible for a chunk that is not on its way."""
        if seq not in self._inflight or seq in self._resend:
            raise Incompatible(f"the decode worker acknowledged chunk {seq}, which is not on its way")
        self._touch()
        if not resend:
            del self._inflight[seq]
            self._seal_if_complete()
            self._note_busy()
        elif seq in self._resent:
            self.abort(Unavailable(f"chunk {seq} was damaged on its way, twice"))
        else:
            self._resent.add(seq)
            self._resend.append(seq)
        self._port.wake()

    def seal_acknowledged(self) -> None:
        if not self._seal_sent:
            raise Incompatible("the decode worker acknowledged a seal that was not sent")
        self._touch()
        self._end()

    def fail(self, error: PagewireError) -> None:
        """Ends the transfer without a word to the peer."""
        if not self._ended.is_set():
            self._error = error
            self._end()

    def _end(self) -> None:
        self._timer.cancel()
        for stopwatch in (self._busy, self._wire):
            stopwatch.turn(on=False)
        self._end_span()
        self._ended.set()
        self._granted.set()
        self._port.ended(self)

    def _end_span(self) -> None:
        if self._span.recording:
            stats = self.stats()
            self._span.set({
                "pagewire.transferred_bytes": stats.bytes, "pagewire.lane": stats.lane, "pagewire.chunks": stats.chunks,
                "pagewire.resent_chunks": stats.resent, "pagewire.kv_overlap": stats.overlap,
            })  # fmt: skip
            if self._error is not None:
                self._span.fail(self._error)
            self._span.end()

    def _seal_if_complete(self) -> None:
        complete = self._plan.done and not self._inflight
        if self._first_tokens is None or not complete or self._seal_sent or self._ended.is_set():
            return
        sealed = kv.Sealed(
            transfer_id=self.transfer_id,
            num_chunks=len(self._checksums),
            root_checksum=root_checksum(self._checksums),
            first_tokens=self._first_tokens,
        )
        self._seal_sent = True
        self._note_busy()
        self._touch()
        self._port.post(kv.ConnectRequest(sealed=sealed))

    def _note_busy(self) -> None:
        may_send = self._window > 0 and self._plan.has_next
        self._wire.turn(on=bool(self._inflight))
        self._busy.turn(on=bool(self._inflight) or may_send or self._seal_sent)

    def _touch(self) -> None:
        self._progress_s = time.monotonic()

    def _watch(self) -> None:
        """A peer that acknowledges nothing while it has something to acknowledge is as good as dead."""
        waiting = bool(self._inflight) or self._seal_sent
        idle_s = time.monotonic() - self._progress_s if waiting else 0.0
        if idle_s >= self._timeout_s:
            self._port.fail(DeadlineExceeded(f"the decode worker acknowledged nothing for {idle_s:.1f} s"))
        else:
            self._timer = self._loop.call_later(self._timeout_s - idle_s, self._watch)
