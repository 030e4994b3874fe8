"""Feeds over real gRPC: one message for many calls, in order, complete, and nothing left when one breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from pagewire.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from pagewire_core.errors import InvalidRequest, PagewireError, Unavailable
from pagewire_core.feed import FeedCall, FeedReader, Feeds
from pagewire_core.rpc import RpcServer, open_channel
from router_scene import until


class FeedServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Serves feeds and nothing else."""

    def __init__(self) -> None:
        self.feeds = Feeds(decode_pb2.FeedResponse)
        self.batches: list[int] = []  # entries in each

    async def Feed(
        self, request: decode_pb2.FeedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.FeedResponse]:
        async with contextlib.aclosing(self.feeds.serve(request.feed_id)) as batches:
            async for batch in batches:
                self.batches.append(len(batch.entries))
                yield batch


@dataclass
class Peers:
    servicer: FeedServicer
    server: RpcServer
    reader: FeedReader

    def say(self, call: FeedCall, token: int) -> bool:
        """Puts a token of this call on its feed; whether that began a new entry."""
        feed = self.servicer.feeds.get(call.feed_id)
        assert feed is not None
        entry, new = feed.entry(call.number)
        entry.choices.add().tokens.add(token_id=token)
        return bool(new)


class Heard:
    """What came of one call; joins the feed while it is entered."""

    def __init__(self, reader: FeedReader) -> None:
        self.tokens: list[int] = []
        self.entries = 0
        self.errors: list[PagewireError] = []
        self._place = reader.joined(self._take, self.errors.append)

    def _take(self, entry: decode_pb2.FeedEntry) -> None:
        self.entries += 1
        self.tokens.extend(t.token_id for choice in entry.choices for t in choice.tokens)

    def __enter__(self) -> Heard:
        call = self._place.__enter__()
        assert call is not None
        self.call = call
        return self

    def __exit__(self, *error: Any) -> None:
        self._place.__exit__(*error)


@contextlib.asynccontextmanager
async def peers() -> AsyncIterator[Peers]:
    servicer, server = FeedServicer(), RpcServer()
    name = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"]
    server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, name)
    port = await server.start("127.0.0.1", 0)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        reader = FeedReader(lambda feed_id: stub.Feed(decode_pb2.FeedRequest(feed_id=feed_id)))
        try:
            reader.open()
            await until(lambda: reader.is_open)
            yield Peers(servicer, server, reader)
        finally:
            await reader.close()
            await server.stop()


async def test_what_many_calls_say_in_one_turn_is_one_message_whose_reading_is_timed() -> None:
    seconds: list[float] = []
    async with peers() as p:
        p.reader.timed = seconds.append
        with contextlib.ExitStack() as stack:
            heard = [stack.enter_context(Heard(p.reader)) for _ in range(32)]
            for h in heard:
                h.call.begin()
            for step in range(3):
                for i, h in enumerate(heard):
                    assert p.say(h.call, 100 * step + i)
                    assert not p.say(h.call, 1000 + i), "one entry of a call in a batch"
                await until(lambda step=step: all(h.entries == step + 1 for h in heard))
            for i, h in enumerate(heard):
                assert h.tokens == [i, 1000 + i, 100 + i, 1000 + i, 200 + i, 1000 + i]
        assert p.servicer.batches == [0, 32, 32, 32] and len(seconds) == 3
        assert all(0 < s < 1 for s in seconds)


async def test_entries_wait_for_the_begin_and_the_end_waits_for_the_entries() -> None:
    """The call's own stream and the feed are two streams: either may be ahead."""
    async with peers() as p:
        with Heard(p.reader) as heard, Heard(p.reader) as other:
            other.call.begin()
            p.say(heard.call, 1)
            p.say(other.call, 9)
            await until(lambda: other.tokens == [9])
            assert heard.tokens == []
            heard.call.begin()
            assert heard.tokens == [1]
            await heard.call.complete(1)
            end = asyncio.create_task(heard.call.complete(3))
            for token in (2, 3):
                assert not end.done()
                p.say(heard.call, token)
                await until(lambda token=token: heard.tokens[-1] == token)
            await end
            assert heard.tokens == [1, 2, 3]


async def test_an_end_that_counts_more_than_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire_core.feed._LAST_ENTRIES_S", 0.05)
    async with peers() as p:
        with Heard(p.reader) as heard:
            heard.call.begin()
            p.say(heard.call, 1)
            with pytest.raises(Unavailable):
                await heard.call.complete(2)
            assert heard.tokens == [1]


async def test_entries_of_a_call_that_has_left_are_dropped() -> None:
    async with peers() as p:
        with Heard(p.reader) as gone:
            gone.call.begin()
        with Heard(p.reader) as heard:
            heard.call.begin()
            assert heard.call.number != gone.call.number
            p.say(gone.call, 1)
            p.say(heard.call, 2)
            await until(lambda: heard.tokens == [2])
        assert gone.tokens == []


async def test_a_break_ends_every_call_and_the_next_feed_is_another_one() -> None:
    async with peers() as p:
        with Heard(p.reader) as one, Heard(p.reader) as two:
            one.call.begin()
            feed = p.servicer.feeds.get(one.call.feed_id)
            assert feed is not None
            await p.server.stop()
            await until(lambda: bool(one.errors and two.errors))
            assert len(one.errors) == len(two.errors) == 1
            assert not p.reader.is_open
            with pytest.raises(Unavailable):
                feed.entry(one.call.number)
            assert p.servicer.feeds.get(one.call.feed_id) is None


async def test_a_feed_that_overflows_ends_its_calls_and_another_one_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed open and refused every entry: no call of that peer got a token until the connection broke."""
    monkeypatch.setattr("pagewire_core.feed._MAX_UNREAD", 10)
    monkeypatch.setattr("pagewire_core.feed._RETRY_S", 0.0)
    async with peers() as p:
        with Heard(p.reader) as heard:
            heard.call.begin()
            for token in range(10):
                p.say(heard.call, token)
            with pytest.raises(Unavailable):
                p.say(heard.call, 10)
            await until(lambda: bool(heard.errors))
            assert [type(error) for error in heard.errors] == [Unavailable] and not heard.tokens
            assert p.servicer.feeds.get(heard.call.feed_id) is None
        p.reader.open()
        await until(lambda: p.reader.is_open)
        with Heard(p.reader) as again:
            again.call.begin()
            p.say(again.call, 1)
            await until(lambda: again.tokens == [1])


async def test_a_feed_that_has_ended_well_ends_no_call_and_opens_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire_core.feed._RETRY_S", 0.0)
    async with peers() as p:
        with Heard(p.reader) as first:
            feed_id = first.call.feed_id
            feed = p.servicer.feeds.get(feed_id)
            assert feed is not None
            feed.drain()
            await until(lambda: not p.reader.is_open)
            assert not first.errors  # its own stream says what becomes of it
        p.reader.open()
        await until(lambda: p.reader.is_open)
        with Heard(p.reader) as second:
            assert second.call.feed_id != feed_id
            second.call.begin()
            p.say(second.call, 5)
            await until(lambda: second.tokens == [5])


async def test_draining_lets_the_last_call_finish_and_then_ends_the_feed() -> None:
    """An idle feed would hold up a server that waits for its running calls."""
    async with peers() as p:
        with Heard(p.reader) as heard:
            heard.call.begin()
            feed = p.servicer.feeds.get(heard.call.feed_id)
            assert feed is not None
            with feed.used():
                p.servicer.feeds.drain()
                p.say(heard.call, 1)
                await until(lambda: heard.tokens == [1])
                p.say(heard.call, 2)
                await until(lambda: heard.tokens == [1, 2])
            await until(lambda: p.servicer.feeds.get(heard.call.feed_id) is None)
        async with asyncio.timeout(20):
            await p.server.stop(60)


async def test_a_peer_without_feeds_is_used_without_one_and_not_asked_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pagewire_core.feed._RETRY_S", 60.0)
    server, asked = RpcServer(), []
    port = await server.start("127.0.0.1", 0)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)

        def ask(feed_id: bytes) -> grpc.aio.UnaryStreamCall:
            asked.append(feed_id)
            return stub.Feed(decode_pb2.FeedRequest(feed_id=feed_id))

        reader = FeedReader(ask)
        for _ in range(20):
            with reader.joined(lambda entry: None, lambda error: None) as call:
                assert call is None
            await asyncio.sleep(0.01)
        assert len(asked) == 1
        await reader.close()
    await server.stop()


@pytest.mark.parametrize("feed_id", [b"", b"short"])
async def test_an_unfit_feed_id_is_refused(feed_id: bytes) -> None:
    feeds = Feeds(decode_pb2.FeedResponse)
    with pytest.raises(InvalidRequest):
        await anext(feeds.serve(feed_id))
    assert feeds.get(feed_id) is None


async def test_two_feeds_cannot_have_one_id() -> None:
    feeds, feed_id = Feeds(decode_pb2.FeedResponse), b"f" * 16
    first = feeds.serve(feed_id)
    assert await anext(first) == decode_pb2.FeedResponse()
    with pytest.raises(InvalidRequest):
        await anext(feeds.serve(feed_id))
    feed = feeds.get(feed_id)
    assert feed is not None
    entry, _ = feed.entry(7)
    entry.choices.add(choice=1, finish_reason=common_pb2.FINISH_REASON_LENGTH)
    assert [e.call for e in (await anext(first)).entries] == [7]
    await first.aclose()
    assert feeds.get(feed_id) is None


async def test_a_reader_that_is_closed_ends_its_feed_and_opens_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire_core.feed._RETRY_S", 0.0)
    async with peers() as p:
        with Heard(p.reader) as heard:
            pass
        await p.reader.close()
        assert not p.reader.is_open
        await until(lambda: p.servicer.feeds.get(heard.call.feed_id) is None)
        p.reader.open()
        assert p.reader._reading is None
