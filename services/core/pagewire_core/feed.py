"""What many calls between the same two peers say at one moment, in one message.

A message costs far more than a token. So a client opens one feed to its peer beside its calls and names
it in each of them; the peer puts the frequent events of all these calls on the feed, those of one turn of
the event loop together, and the rare ones (begin, end, failure) on each call's own stream. The client
puts both in order again: entries wait for the call's first event, its last event waits for the entries
that it counts. A feed that breaks has lost entries, so it ends every call on it.

    server: Feeds, Feed        client: FeedReader, FeedCall

Batches and entries are messages of the contract, known here by their fields alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grpc

from pagewire_core.errors import InvalidRequest, PagewireError, Unavailable, from_rpc

_ID_BYTES = 16
_MAX_FEEDS = 4096
_LAST_ENTRIES_S = 5.0  # they were sent before the word that counts them
_MAX_UNREAD = 1 << 18  # additions to a batch that its reader does not take: several seconds of many calls
_RETRY_S = 1.0  # a peer that has just refused or lost a feed is not asked again for so long


class Batch(Protocol):
    """A message with `entries`, each of which has the number of its `call`."""

    @property
    def entries(self) -> Any: ...


B = TypeVar("B", bound=Batch)


class Feed(Generic[B]):
    """The server's end of one feed."""

    def __init__(self, make_batch: Callable[[], B]) -> None:
        self._make_batch = make_batch
        self._batch = make_batch()
        self._num_added = 0  # to it
        self._entries: dict[int, Any] = {}  # of the batch that is being filled, by call
        self._wake = asyncio.Event()
        self._num_users = 0
        self._draining = False
        self._closed = False

    def entry(self, call: int) -> tuple[Any, bool]:
        """The call's entry in the next batch, to be filled in now, and whether it is new.

        Raises Unavailable when the feed has ended: the call's reader has given it up then.
        """
        self._num_added += 1
        if self._num_added > _MAX_UNREAD:
            self._closed = True
        if self._closed:
            raise Unavailable("the caller's feed has ended")
        known = self._entries.get(call)
        if known is not None:
            return known, False
        made = self._entries[call] = self._batch.entries.add(call=call)
        self._wake.set()
        return made, True

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The body may add entries: a feed that drains does not end before it."""
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            if self._draining:
                self._wake.set()

    def drain(self) -> None:
        """Ends the feed once nobody uses it."""
        self._draining = True
        self._wake.set()

    def close(self) -> None:
        """Nothing is read from it any more."""
        self._closed = True

    async def batches(self) -> AsyncIterator[B]:
        """An empty batch first; then all that was added since the last one, as soon as there is anything.

        Raises Unavailable once more was added than a reader that stands still may leave.
        """
        yield self._make_batch()
        while self._entries or not (self._draining and self._num_users == 0):
            await self._wake.wait()  # who adds in the same turn of the event loop is in this batch too
            self._wake.clear()
            if self._closed:  # its calls have lost entries: the reader is to know that, and opens another feed
                raise Unavailable(f"the feed's reader left more than {_MAX_UNREAD} additions unread")
            if self._entries:
                batch, self._batch = self._batch, self._make_batch()
                self._entries.clear()
                self._num_added = 0
                yield batch


class Feeds(Generic[B]):
    """The feeds that a server's clients have open."""

    def __init__(self, make_batch: Callable[[], B]) -> None:
        self._make_batch = make_batch
        self._open: dict[bytes, Feed[B]] = {}
        self._draining = False

    def get(self, feed_id: bytes) -> Feed[B] | None:
        """None: no such feed is open, and the call is to use its own stream."""
        return self._open.get(feed_id)

    def drain(self) -> None:
        """Lets each feed end after the last call that uses it: an idle one would hold up a stopping server."""
        self._draining = True
        for feed in self._open.values():
            feed.drain()

    async def serve(self, feed_id: bytes) -> AsyncGenerator[B, None]:
        """The batches of a new feed, which is open while they are read. Raises InvalidRequest."""
        if len(feed_id) != _ID_BYTES or feed_id in self._open:
            raise InvalidRequest(f"feed_id must be {_ID_BYTES} bytes that no open feed has")
        if self._draining:
            raise Unavailable("this server is shutting down")
        if len(self._open) >= _MAX_FEEDS:
            raise Unavailable(f"more than {_MAX_FEEDS} feeds are open here")
        feed = self._open[feed_id] = Feed(self._make_batch)
        try:
            async for batch in feed.batches():
                yield batch
        finally:
            del self._open[feed_id]
            feed.close()


class FeedCall:
    """One call's place on a feed, on the client's side; `feed_id` and `number` are for the request.

    Its entries go to `receive`, in order and not before `begin`; `broken` is told once if the feed breaks.
    """

    def __init__(
        self, feed_id: bytes, number: int, receive: Callable[[Any], None], broken: Callable[[PagewireError], None]
    ) -> None:
        self.feed_id, self.number = feed_id, number
        self.broken = broken
        self._receive = receive
        self._early: list[Any] | None = []  # came before the call's first event; None: nothing waits any more
        self._num_received = 0
        self._awaited: tuple[int, asyncio.Future[None]] | None = None

    def take(self, entry: Any) -> None:
        self._num_received += 1
        if self._early is not None:
            self._early.append(entry)
        else:
            self._receive(entry)
        if self._awaited is not None and self._num_received >= self._awaited[0] and not self._awaited[1].done():
            self._awaited[1].set_result(None)

    def begin(self) -> None:
        """The call's own stream has begun: entries may follow."""
        early, self._early = self._early or [], None
        for entry in early:
            self._receive(entry)

    async def complete(self, num_entries: int) -> None:
        """Returns when so many entries have come. Raises Unavailable if they do not."""
        if self._num_received < num_entries:
            self._awaited = num_entries, asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait_for(self._awaited[1], _LAST_ENTRIES_S)
            except TimeoutError:
                raise Unavailable("entries of the feed were lost") from None


class FeedReader:
    """The client's end of the feeds to one peer, one at a time; it is opened again after a break.

    `open_feed` makes the call, given the feed's id; `explain` says what a call's failure means. `timed` is told the
    seconds that each batch took those who received it.
    """

    def __init__(
        self,
        open_feed: Callable[[bytes], grpc.aio.UnaryStreamCall],
        explain: Callable[[grpc.aio.AioRpcError], PagewireError] = from_rpc,
    ) -> None:
        self._open_feed, self._explain = open_feed, explain
        self.timed: Callable[[float], None] | None = None
        self._feed_id: bytes | None = None  # of the feed that is open
        self._calls: dict[int, FeedCall] = {}
        self._last_number = 0
        self._reading: asyncio.Task[None] | None = None
        self._not_before = 0.0

    @property
    def is_open(self) -> bool:
        return self._feed_id is not None

    def open(self) -> None:
        """Begins to open a feed unless there is one; a peer that has none to offer is left alone for a while."""
        if self._reading is None and time.monotonic() >= self._not_before:
            self._reading = asyncio.create_task(self._read())

    @contextlib.contextmanager
    def joined(
        self, receive: Callable[[Any], None], broken: Callable[[PagewireError], None]
    ) -> Iterator[FeedCall | None]:
        """A place on the feed while the body runs; None while no feed is open."""
        self.open()
        if self._feed_id is None:
            yield None
            return
        self._last_number += 1
        call = FeedCall(self._feed_id, self._last_number, receive, broken)
        self._calls[call.number] = call
        try:
            yield call
        finally:
            self._calls.pop(call.number, None)

    async def close(self) -> None:
        """Ends the feed for good."""
        self._not_before = float("inf")
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        feed_id = secrets.token_bytes(_ID_BYTES)
        call = self._open_feed(feed_id)
        failure: grpc.aio.AioRpcError | None = None
        try:
            async for batch in call:
                self._feed_id = feed_id
                self._spread(batch.entries)
        except grpc.aio.AioRpcError as error:
            failure = error
        finally:
            call.cancel()
            self._not_before = max(self._not_before, time.monotonic() + _RETRY_S)
            self._reading = self._feed_id = None
            calls, self._calls = self._calls, {}
            # A feed ends well when nobody over there uses it any more: the calls that are still here have all that it
            # had for them, or were not begun, and are told so on their own streams.
            for lost in calls.values() if failure else ():
                lost.broken(self._explain(failure))

    def _spread(self, entries: Sequence[Any]) -> None:
        begun = time.perf_counter()
        for entry in entries:
            call = self._calls.get(entry.call)
            if call is not None:  # else it has ended meanwhile
                call.take(entry)
        if self.timed is not None and entries:
            self.timed(time.perf_counter() - begun)
