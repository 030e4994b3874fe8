"""The router between two feeds: tokens ahead of, or behind, what the calls' own streams say."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from fakes import FakeWorker
from pagewire.v1 import inference_pb2
from pagewire_core.errors import PagewireError, Unavailable
from pagewire_core.feed import FeedCall, FeedReader
from pagewire_core.tokenizer import Tokenizer
from router_scene import EOS, Answer, Scene, request, scene, until


@pytest.fixture(autouse=True)
def worker_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "feed", "in order")


@pytest_asyncio.fixture
async def pair(byte_tokenizer: Tokenizer) -> AsyncIterator[Scene]:
    async with scene(byte_tokenizer, "p1 d1") as s:
        yield s


@pytest_asyncio.fixture
async def deltas(pair: Scene) -> AsyncIterator[FeedReader]:
    """An open feed of the router's deltas."""
    reader = FeedReader(lambda feed_id: pair.stub.DeltaFeed(inference_pb2.DeltaFeedRequest(feed_id=feed_id)))
    reader.open()
    await until(lambda: reader.is_open)
    yield reader
    await reader.close()


async def ask_over(deltas: FeedReader, s: Scene, text: str, **fields: Any) -> tuple[Answer, FeedCall]:
    """One request whose deltas come over the feed; every rule of the order is checked by Answer."""
    answer = Answer()

    def take(entry: inference_pb2.DeltaFeedEntry) -> None:
        for delta in entry.deltas:
            answer.add(inference_pb2.GenerateResponse(delta=delta))

    broken: list[PagewireError] = []
    with deltas.joined(take, broken.append) as place:
        assert place is not None
        asked = request(text, **fields)
        asked.feed_id, asked.feed_call = place.feed_id, place.number
        async for response in s.stub.Generate(asked):
            assert response.WhichOneof("event") != "delta"
            await place.complete(response.feed_entries)
            answer.add(response)
            place.begin()
    assert not broken
    return answer, place


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("n", [1, 3])
async def test_tokens_that_overtake_started_or_finished_keep_their_place(
    pair: Scene, monkeypatch: pytest.MonkeyPatch, order: str, n: int
) -> None:
    monkeypatch.setattr(FakeWorker, "feed", order)
    for name in ("one", "two"):
        answer = await pair.ask(name, n=n)
        assert answer.ids == {i: [*pair.ids("hello world"), EOS] for i in range(n)}
        assert answer.summary is not None
        assert answer.summary.attempts == 1
    await pair.settle()


async def test_a_break_of_the_feed_loses_the_decode_leg_as_a_break_of_its_own_stream_does(pair: Scene) -> None:
    """Tokens on it are lost, so the attempt cannot go on though its own stream is whole."""
    worker = pair.workers["d1"]
    worker.script.step_s = 0.02
    call = pair.stub.Generate(request(sampling={"max_tokens": 20}))
    answer = Answer()
    async for response in call:
        answer.add(response)
        if len(answer.ids.get(0, ())) == 3:
            worker.feeds.drain()
    assert answer.text == {0: "hello world"}
    assert answer.summary is not None
    assert answer.summary.attempts == 2
    assert len(worker.requests[-1].prior[0].token_ids) >= 3
    await pair.settle()


async def test_without_a_feed_of_the_client_deltas_come_on_the_calls_own_stream(pair: Scene) -> None:
    asked = request("native")
    asked.feed_id, asked.feed_call = b"x" * 16, 1  # none that is open
    answer = Answer()
    async for response in pair.stub.Generate(asked):
        assert response.feed_entries == 0
        answer.add(response)
    assert answer.text == {0: "hello world"}


async def test_many_requests_over_one_feed_get_each_their_own_text(pair: Scene, deltas: FeedReader) -> None:
    answers = await asyncio.gather(*(ask_over(deltas, pair, f"question {i}", n=1 + i % 3) for i in range(12)))
    for i, (answer, _) in enumerate(answers):
        assert answer.text == dict.fromkeys(range(1 + i % 3), "hello world")
        assert answer.summary is not None
    assert len({place.number for _, place in answers}) == len(answers)
    await pair.settle()


async def test_a_stop_string_ends_a_choice_whose_tokens_pass_from_feed_to_feed(pair: Scene, deltas: FeedReader) -> None:
    """Nobody waits for a token then: the decode worker is told all the same, and the answer ends before its work."""
    worker = pair.workers["d1"]
    worker.script.step_s = 0.002
    worker.script.hooks["finished"] = lambda _: asyncio.sleep(60)
    worker.script.tokens = pair.ids("hello world and more")
    async with asyncio.timeout(10):
        answer, _ = await ask_over(deltas, pair, "question", sampling={"stop": ["o w"]})
    assert (answer.text, answer.finish[0].stop_string) == ({0: "hell"}, "o w")
    await pair.settle()
    assert worker.stopped == [()]


async def test_what_a_request_cannot_take_from_a_feed_loses_its_attempt_and_not_the_feed(
    pair: Scene, deltas: FeedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, asked = FakeWorker._steps, itertools.count()

    async def of_another(self: FakeWorker, request: Any) -> AsyncIterator[Any]:
        wrong = next(asked) == 0
        async for step in steps(self, request):
            if wrong:
                await asyncio.sleep(0.02)  # the request waits for it
                step.choices[0].choice = 7
            yield step

    monkeypatch.setattr(FakeWorker, "_steps", of_another)
    known = pair.router.services.workers.get("d1")
    assert known is not None
    reading = known.feed._reading
    answer, _ = await ask_over(deltas, pair, "question")
    assert answer.text == {0: "hello world"}
    assert answer.summary is not None and answer.summary.attempts == 2
    assert reading is not None and known.feed._reading is reading, "others share it"


async def test_entries_that_never_come_lose_the_attempt(pair: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire_core.feed._LAST_ENTRIES_S", 0.05)
    take, lost = FeedCall.take, itertools.count()

    def forget_the_first(self: FeedCall, entry: Any) -> None:
        if next(lost):
            take(self, entry)

    monkeypatch.setattr(FeedCall, "take", forget_the_first)
    answer = await pair.ask("question")
    assert answer.text == {0: "hello world"}
    assert answer.summary is not None and answer.summary.attempts == 2


async def test_an_error_comes_after_the_deltas_that_were_made_before_it(pair: Scene, deltas: FeedReader) -> None:
    async def fail(worker: FakeWorker) -> None:
        if worker.seen.count("decode") >= 4:
            for _ in range(20):  # turns of the loop, for what it has made to leave it
                await asyncio.sleep(0.005)
            raise Unavailable("the engine failed")

    pair.workers["d1"].script.hooks["decode"] = fail
    answer, _ = await ask_over(deltas, pair, "question")
    assert answer.text == {0: "hell"}
    assert answer.error is not None
    assert answer.summary is None
    await pair.settle()


async def test_a_client_that_leaves_with_a_feed_open_leaves_nothing_behind(pair: Scene, deltas: FeedReader) -> None:
    pair.workers["d1"].script.step_s = 0.02
    asking = asyncio.create_task(ask_over(deltas, pair, "question"))
    await until(lambda: "decode" in pair.workers["d1"].seen)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await pair.settle()
    answer, _ = await ask_over(deltas, pair, "another")
    assert answer.text == {0: "hello world"}
