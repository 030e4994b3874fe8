"""What a decode call says on its own stream, and what on the feed that its caller has open."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from engines import ROOT, assert_empty, make_engine
from pagewire.v1 import common_pb2, decode_pb2
from pagewire_core.errors import (
    Cancelled,
    ContextLength,
    Internal,
    InvalidRequest,
    Overloaded,
    PagewireError,
    Unavailable,
)
from pagewire_core.feed import Feed
from pagewire_decode.call import Call
from pagewire_decode.servicer import DecodeServicer
from pagewire_decode.transfers import Transfers
from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, Failed, Finished, Started, Token
from pagewire_engine.metrics import StageMetrics
from pagewire_engine.sampler import Sampled
from prometheus_client import CollectorRegistry
from tiny_models import make_model

STOP = common_pb2.FINISH_REASON_STOP


class Told:
    """A call that an engine is telling of, and its caller."""

    def __init__(self, *, n: int = 1, feed: Feed[Any] | None = None, **fields: Any) -> None:
        request = decode_pb2.DecodeRequest(prompt_ids=[5, 6, 7], n=n, feed_call=3, **fields)
        self.registry = CollectorRegistry()
        self.call = Call(request, feed)
        self._responses: AsyncIterator[Any] = self.call.responses(StageMetrics(self.registry))  # type: ignore[arg-type]

    def tell(self, *events: Event) -> None:
        for event in events:
            self.call.take(event)

    async def next(self) -> decode_pb2.DecodeResponse:
        async with asyncio.timeout(5):
            return await anext(self._responses)  # type: ignore[no-any-return]

    def stages(self) -> set[str]:
        """Those of which it took a time."""
        samples = next(iter(self.registry.collect())).samples
        return {s.labels["stage"] for s in samples if s.name.endswith("_count") and s.value}


def token(number: int, choice: int = 0, end: common_pb2.FinishReason | None = None) -> Token:
    return Token(choice, Sampled(number), end)


def given(choices: Sequence[common_pb2.ChoiceTokens]) -> list[tuple[int, list[int], int]]:
    return [(c.choice, [t.token_id for t in c.tokens], c.finish_reason) for c in choices]


async def test_without_a_feed_each_token_is_told_as_soon_as_it_is_there() -> None:
    told = Told(local_prefill=True)
    told.tell(Started(2), token(8))
    started = (await told.next()).started
    assert [t.token_id for t in started.first_tokens] == [8]
    assert (started.cached_tokens, started.computed_tokens, started.resumed) == (2, 1, False)
    told.tell(token(9))
    assert given((await told.next()).tokens.choices) == [(0, [9], 0)]
    told.tell(token(10), token(11, end=STOP), Finished(0))
    assert given((await told.next()).tokens.choices) == [(0, [10, 11], STOP)]
    assert (await told.next()).finished.feed_entries == 0


async def test_on_a_feed_are_all_tokens_but_the_first_and_every_end() -> None:
    """An answer of one token ends there, too: its stream says that it is over once all of it must have come."""
    feed: Feed[Any] = Feed(decode_pb2.FeedResponse)
    batches = feed.batches()
    await anext(batches)  # the empty one
    told = Told(n=2, feed=feed)
    told.tell(token(8), token(9, 1, STOP))
    assert [t.token_id for t in (await told.next()).started.first_tokens] == [8, 9]
    told.tell(token(10), token(11))
    [entry] = (await anext(batches)).entries
    assert (entry.call, given(entry.choices)) == (3, [(1, [], STOP), (0, [10, 11], 0)])
    told.tell(token(12, end=STOP), Finished(4))
    finished = (await told.next()).finished
    assert (finished.feed_entries, finished.num_preemptions) == (2, 4)
    [entry] = (await anext(batches)).entries
    assert given(entry.choices) == [(0, [12], STOP)]


async def test_a_call_that_is_resumed_has_begun_when_it_comes() -> None:
    told = Told(n=2, prior=[decode_pb2.PriorOutput(token_ids=[8]), decode_pb2.PriorOutput(ended=True)])
    assert told.call.prior == [[8], None]
    started = (await told.next()).started
    assert started.resumed and not started.first_tokens
    told.tell(token(9))
    assert given((await told.next()).tokens.choices) == [(0, [9], 0)]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_that_fails_says_why(begun: bool) -> None:
    told = Told(n=2)
    if begun:
        told.tell(token(8), token(9, 1))
        await told.next()
    told.tell(Failed(Internal("no numbers")))
    with pytest.raises(Internal, match="no numbers"):
        await told.next()


async def test_a_call_whose_feed_has_ended_ends() -> None:
    feed: Feed[Any] = Feed(decode_pb2.FeedResponse)
    told = Told(feed=feed)
    told.tell(token(8))
    await told.next()
    feed.close()
    told.tell(token(9))
    with pytest.raises(Unavailable, match="feed has ended"):
        await told.next()


@pytest.mark.parametrize(("local", "stages"), [(True, {"queue", "prefill", "decode"}), (False, {"decode"})])
async def test_a_prompt_that_another_worker_computed_has_no_times_here(local: bool, stages: set[str]) -> None:
    told = Told(local_prefill=local)
    told.tell(*([Started(0)] if local else []), token(8, end=STOP), Finished(0))
    timings = [await told.next() for _ in range(3)][-1].finished.timings
    assert told.stages() == stages
    assert (timings.prefill_us > 0) is local and timings.queue_us + timings.prefill_us + timings.decode_us < 5e6


class Served:
    """A decode servicer over a real engine, which steps when it is told to, and one call of it."""

    def __init__(self, engine: Engine) -> None:
        stages: Any = StageMetrics(CollectorRegistry())
        self.engine, self.id = engine, os.urandom(16)
        self.servicer = DecodeServicer(engine, Transfers(engine), stages, "life", "address")

    def begin(self, *, max_tokens: int = 5, **fields: Any) -> None:
        sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        fields = {"transfer_id": self.id, "local_prefill": True, "n": 2, **fields}
        request = decode_pb2.DecodeRequest(prompt_ids=[5, 6, 7], cache_root=ROOT, sampling=sampling, **fields)
        self._responses: Any = self.servicer.Decode(request, None)  # type: ignore[arg-type]

    async def next(self) -> decode_pb2.DecodeResponse:
        """After a step."""
        waiting = asyncio.ensure_future(anext(self._responses))
        while not waiting.done():
            await asyncio.sleep(0)
            self.engine.step()
        return waiting.result()  # type: ignore[no-any-return]

    async def rest(self) -> list[tuple[int, list[int], int]]:
        """What else is told of the choices, to the end."""
        told = []
        while not (response := await self.next()).HasField("finished"):
            told += given(response.tokens.choices)
        with pytest.raises(StopAsyncIteration):
            await self.next()
        return told

    async def stop(self, *choices: int) -> bool:
        request = decode_pb2.StopRequest(transfer_id=self.id, choices=choices)
        return (await self.servicer.Stop(request, None)).found  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(make_model(tmp_path_factory.mktemp("llama"), "llama"))


async def test_a_choice_that_is_stopped_ends_and_the_others_go_on(engine: Engine) -> None:
    served = Served(engine)
    served.begin()
    assert len((await served.next()).started.first_tokens) == 2
    assert await served.stop(0)
    told = [choice for choice, _, _ in await served.rest()]
    assert told.count(1) == 4 > told.count(0)
    assert not await served.stop(1), "it is over"
    assert_empty(engine)


@pytest.mark.parametrize("ends", ["stopped", "handed over"])
async def test_a_call_that_is_ended_from_outside_gives_all_back(engine: Engine, ends: str) -> None:
    served = Served(engine)
    served.begin()
    await served.next()
    if ends == "stopped":
        assert await served.stop()
    else:
        served.servicer.hand_over()
    with pytest.raises(Cancelled if ends == "stopped" else Unavailable):
        await served.rest()
    assert not served.servicer.num_calls
    assert_empty(engine)


async def test_a_second_call_by_an_id_is_refused_and_takes_nothing_from_the_first(engine: Engine) -> None:
    """The second decoded to its end for nobody once the first had ended."""
    first, second = Served(engine), Served(engine)
    second.servicer, second.id = first.servicer, first.id
    first.begin()
    await first.next()
    second.begin()
    with pytest.raises(InvalidRequest, match="already has its Decode call"):
        await second.next()
    assert await first.stop(0), "it can still be found"
    await first.rest()
    assert not first.servicer.num_calls
    assert_empty(engine)


@pytest.mark.parametrize(("max_tokens", "taken"), [(1, True), (2, False)])
async def test_a_worker_that_decodes_for_nobody_takes_what_ends_with_its_first_token(
    engine: Engine, max_tokens: int, taken: bool
) -> None:
    served = Served(engine)
    served.servicer.refusing = served.servicer.taking_one_token = True
    served.begin(max_tokens=max_tokens)
    if taken:
        assert (await served.next()).HasField("started")
        await served.rest()
    else:
        with pytest.raises(Overloaded):
            await served.next()
    assert_empty(engine)


async def test_a_call_names_its_transfer(engine: Engine) -> None:
    served = Served(engine)
    served.begin(transfer_id=b"short")
    with pytest.raises(InvalidRequest, match="16 bytes"):
        await served.next()


@pytest.mark.parametrize(
    ("prior", "error"),
    [
        ([decode_pb2.PriorOutput(token_ids=[8])], InvalidRequest),
        ([decode_pb2.PriorOutput(ended=True)] * 2, InvalidRequest),
        ([decode_pb2.PriorOutput(ended=True), decode_pb2.PriorOutput(token_ids=[8] * 253)], ContextLength),
    ],
    ids=["of one choice of two", "all ended", "too long"],
)
async def test_what_cannot_be_gone_on_with_is_refused(
    engine: Engine, prior: Sequence[decode_pb2.PriorOutput], error: type[PagewireError]
) -> None:
    served = Served(engine)
    served.begin(prior=prior)
    with pytest.raises(error):
        await served.next()
    assert_empty(engine)
