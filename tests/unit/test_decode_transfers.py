"""Incoming prompts on a decode worker: credits, pages and leases under every order of events."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ROOT, Run, assert_empty, make_engine, run_all
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pagewire.v1 import common_pb2, decode_pb2
from pagewire_core.errors import (
    Cancelled,
    ContextLength,
    InvalidRequest,
    Overloaded,
    PagewireError,
    TransferLost,
    Unavailable,
)
from pagewire_decode import transfers as module
from pagewire_decode.servicer import DecodeServicer
from pagewire_decode.transfers import Transfers
from pagewire_engine.engine import Engine
from pagewire_engine.line import PATIENCE_S, Line
from pagewire_engine.metrics import StageMetrics
from pagewire_transfer.receiver import ReceiveStats
from prometheus_client import CollectorRegistry
from tiny_models import make_model

PROMPT = list(range(5, 55))  # 50 tokens: 4 blocks

FIRST = [common_pb2.SampledToken(token_id=7)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def engine(path: Path) -> Engine:
    return make_engine(path, kv_cache_memory_bytes=384 * 16 * 16)  # 16 blocks


def wire(num_tokens: int) -> torch.Tensor:
    return torch.ones(3, 2, num_tokens, 1, 16)


async def test_the_way_of_a_transfer(engine: Engine) -> None:
    """Credits first, pages when the prompt is about to be computed, everything back at the end."""
    transfers, name = Transfers(engine), os.urandom(16)
    assert transfers.reserve(name, PROMPT, ROOT, 1).local_tokens == 0
    assert (engine.load()["reserved_blocks"], engine.blocks.num_held) == (5, 0)
    transfer = transfers.claim(name)
    with pytest.raises(InvalidRequest, match="already has its Decode call"):
        transfers.claim(name)
    with pytest.raises(Cancelled, match="never begun"):
        await transfers.sealed(name, "stats", FIRST)  # type: ignore[arg-type]
    await transfers.bind(name, 0, 50)
    assert (engine.load()["reserved_blocks"], engine.blocks.num_held) == (0, 4)
    transfers.scatter(name, (0, 3), (0, 50), wire(50))
    for wrong in ([], [common_pb2.SampledToken(token_id=1 << 20)]):  # a token of no vocabulary is never computed from
        with pytest.raises(InvalidRequest):
            await transfers.sealed(name, "stats", wrong)  # type: ignore[arg-type]
    await transfers.sealed(name, "stats", FIRST)  # type: ignore[arg-type]
    with pytest.raises(Cancelled):
        await transfers.sealed(name, "others", FIRST)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="has its pages"):  # what is verified is not written again
        await transfers.bind(name, 0, 50)
    assert await transfer.ready == ("stats", FIRST)
    table = transfers.take(transfer)
    slots = engine.runner.cache.gather(table, (0, 3), (0, 50))
    assert torch.equal(slots, wire(50))
    engine.blocks.release(table)
    assert_empty(engine)


async def test_what_is_cached_here_is_pinned_and_not_asked_for(engine: Engine) -> None:
    run_all(engine, Run(PROMPT))
    transfers, name = Transfers(engine), os.urandom(16)
    assert transfers.reserve(name, PROMPT, ROOT, 1).local_tokens == 48
    assert engine.blocks.num_held == 3
    assert transfers.reserve(os.urandom(16), PROMPT, b"another tenant's root".ljust(32), 1).local_tokens == 0
    await transfers.bind(name, 48, 50)
    for key in list(transfers._transfers):
        transfers.end(key, Cancelled("test"))
    assert_empty(engine)


async def test_more_than_the_pool_holds_is_refused_and_costs_nothing(engine: Engine) -> None:
    transfers = Transfers(engine)
    for _ in range(3):
        transfers.reserve(os.urandom(16), PROMPT, ROOT, 1)
    with pytest.raises(Overloaded, match="5 KV blocks wanted, 1 free"):
        transfers.reserve(os.urandom(16), PROMPT, ROOT, 1)
    with pytest.raises(ContextLength):
        transfers.reserve(os.urandom(16), [5] * 256, ROOT, 1)
    assert engine.load()["reserved_blocks"] == 15
    for key in list(transfers._transfers):
        transfers.end(key, Cancelled("test"))
    assert_empty(engine)


async def test_who_asks_again_has_the_room_before_those_who_came_later(engine: Engine) -> None:
    """A large prompt waited for as long as another router's small ones took each block that became free."""
    transfers, large = Transfers(engine), [7] * 160

    def ask(prompt: list[int]) -> bytes:
        name = os.urandom(16)
        transfers.reserve(name, prompt, ROOT, 1)
        return name

    ends = [ask([i] * 50) for i in range(2)]
    for _ in range(2):
        with pytest.raises(Overloaded):
            ask(large)
    with pytest.raises(Overloaded, match="5 KV blocks wanted, 0 free"):
        ask([8] * 50)
    for name in ends:
        transfers.end(name, Cancelled("test"))
    ask(large)
    ask([8] * 50)
    transfers.end_all(Cancelled("test"))
    assert_empty(engine)


async def test_a_large_prompt_for_a_transfer_does_not_starve_beside_prompts_that_are_computed_here(
    engine: Engine,
) -> None:
    """Its claim was refused for as long as one of them took each block that became free."""
    transfers, name = Transfers(engine), os.urandom(16)
    engine.submit(Run(PROMPT, max_tokens=8).request)
    engine.step()
    for _ in range(2):
        with pytest.raises(Overloaded):
            transfers.reserve(name, [7] * 200, ROOT, 1)
    later = Run([8] * 50, max_tokens=8)
    engine.submit(later.request)
    for _ in range(20):
        engine.step()
    assert not later.events, "there is room for it only where the larger one waits"
    transfers.reserve(name, [7] * 200, ROOT, 1)
    transfers.end(name, Cancelled("test"))
    run_all(engine)
    assert later.tokens()


async def test_a_claim_keeps_nothing_from_prompts_that_came_before_it(engine: Engine) -> None:
    """Each would have waited for what the other wanted."""
    transfers, name = Transfers(engine), os.urandom(16)
    running, waiting = Run(PROMPT, max_tokens=8), Run([8] * 190, max_tokens=8)
    for run in (running, waiting):
        engine.submit(run.request)
        engine.step()
    for _ in range(2):
        with pytest.raises(Overloaded):
            transfers.reserve(name, [7] * 100, ROOT, 1)
    while not waiting.events:
        assert engine.step()
    run_all(engine)
    transfers.reserve(name, [7] * 100, ROOT, 1)
    transfers.end(name, Cancelled("test"))


async def test_a_prompt_does_not_wait_for_its_own_claim_when_it_is_computed_here_after_all(engine: Engine) -> None:
    transfers, prompt = Transfers(engine), [7] * 200
    servicer = DecodeServicer(engine, transfers, StageMetrics(CollectorRegistry()), "life", "address")  # type: ignore[arg-type]
    engine.external.reserve(8)
    for _ in range(2):
        with pytest.raises(Overloaded):
            transfers.reserve(os.urandom(16), prompt, ROOT, 1)
    engine.external.unreserve(8)
    sampling = common_pb2.SamplingParams(max_tokens=1)
    request = decode_pb2.DecodeRequest(
        transfer_id=os.urandom(16), prompt_ids=prompt, cache_root=ROOT, sampling=sampling, local_prefill=True
    )
    responses: Any = servicer.Decode(request, None)  # type: ignore[arg-type]
    call = asyncio.ensure_future(anext(responses))
    await asyncio.sleep(0)
    while engine.step():
        pass
    assert (await asyncio.wait_for(call, 5)).started.first_tokens
    await responses.aclose()
    assert_empty(engine)


async def test_a_prompt_that_fills_the_pool_finds_room_also_where_most_of_it_is_cached(engine: Engine) -> None:
    """It was promised a block for its next token beyond those that there are, and refused for ever."""
    prompt = [5 + i % 200 for i in range(245)]  # 16 blocks of 16
    for cached in (0, 240):
        transfers, name = Transfers(engine), os.urandom(16)
        assert transfers.reserve(name, prompt, ROOT, 1).local_tokens == cached
        await transfers.bind(name, cached, 245)
        transfers.end(name, Cancelled("test"))
        run_all(engine, Run(prompt, max_tokens=1))


async def test_reserving_twice_is_reserving_once(engine: Engine) -> None:
    transfers, name = Transfers(engine), os.urandom(16)
    assert transfers.reserve(name, PROMPT, ROOT, 1) is transfers.reserve(name, PROMPT, ROOT, 1)
    transfers.end(name, Cancelled("test"))
    assert_empty(engine)


async def test_a_stopped_transfer_refuses_whatever_comes_late(engine: Engine) -> None:
    """A cancel can overtake the call it cancels; the late call must not take room for nobody."""
    transfers, name = Transfers(engine), os.urandom(16)
    transfers.end(name, Cancelled("stopped before it began"))
    with pytest.raises(Cancelled):
        transfers.reserve(name, PROMPT, ROOT, 1)
    with pytest.raises(Cancelled):
        await transfers.bind(name, 0, 50)
    with pytest.raises(Cancelled):
        transfers.claim(name)
    with pytest.raises(Cancelled):
        transfers.scatter(name, (0, 3), (0, 50), wire(50))
    assert_empty(engine)


async def test_a_call_that_comes_late_is_told_what_ended_its_transfer(engine: Engine) -> None:
    """Each heard that it had been stopped, so that room which was taken back counted as the worker's failure."""
    transfers = Transfers(engine)
    causes = [Overloaded("needed here", retry_after_s=1.0), TransferLost("the peer was lost"), Unavailable("it stops")]
    for cause in causes:
        name = os.urandom(16)
        transfers.reserve(name, PROMPT, ROOT, 1)
        transfers.failed(name, cause)
        transfers.end(name, Cancelled("the decode call ended"))
        for _ in range(2):
            with pytest.raises(type(cause), match=cause.message) as told:
                transfers.claim(name)
            assert told.value.retry_after_s == cause.retry_after_s
        with pytest.raises(type(cause)):
            await transfers.bind(name, 0, 50)
    assert_empty(engine)


async def test_a_reservation_that_nobody_uses_ends_with_its_lease(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_S", 0.05)
    transfers, name = Transfers(engine), os.urandom(16)
    transfers.reserve(name, PROMPT, ROOT, 1)
    await transfers.bind(name, 0, 50)
    await asyncio.sleep(0.1)
    assert len(transfers) == 0
    assert_empty(engine)
    with pytest.raises(Cancelled):
        transfers.claim(name)


class SlowConstraints:
    """Compiles for as long as it is to."""

    def __init__(self) -> None:
        self.begun, self.done = asyncio.Event(), asyncio.Event()

    async def make(self, *_: object) -> None:
        self.begun.set()
        await self.done.wait()


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_reservation_whose_call_compiles_its_grammar_does_not_end_with_its_lease(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """The call had come: it was told that its transfer had been stopped, or left it behind."""
    monkeypatch.setattr(module, "LEASE_S", 0.05)
    transfers, name, constraints = Transfers(engine), os.urandom(16), SlowConstraints()
    stages: Any = StageMetrics(CollectorRegistry())
    servicer = DecodeServicer(engine, transfers, stages, "life", "address", constraints)  # type: ignore[arg-type]
    transfers.reserve(name, PROMPT, ROOT, 1)
    sampling = common_pb2.SamplingParams(max_tokens=1, constraint=common_pb2.Constraint(answer="long"))
    request = decode_pb2.DecodeRequest(transfer_id=name, prompt_ids=PROMPT, cache_root=ROOT, sampling=sampling)
    responses: Any = servicer.Decode(request, None)  # type: ignore[arg-type]
    call = asyncio.ensure_future(anext(responses))
    await constraints.begun.wait()
    await asyncio.sleep(0.1)
    if leaves:
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        await transfers.bind(name, 0, 50)
        await transfers.sealed(name, ReceiveStats(1, 1, 50, "grpc"), FIRST)
        constraints.done.set()
        assert (await call).started.first_tokens[0].token_id == 7
        await responses.aclose()
    assert_empty(engine)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prior": [decode_pb2.PriorOutput(token_ids=[7, 1 << 20])]},
        {"sampling": common_pb2.SamplingParams(logit_bias={1 << 20: 1.0})},
        {"sampling": common_pb2.SamplingParams(logprobs=0, logprob_token_ids=[1 << 20])},
        {"prior": [decode_pb2.PriorOutput(token_ids=[7] * 256)]},
        {"prompt_ids": list(range(5, 95))},
        {"prompt_ids": [*PROMPT[:-1], 4]},
        {"n": 2},
        {"cache_root": b"another tenant's root".ljust(32)},
    ],
    ids=["prior", "logit_bias", "logprob_token_ids", "too long", "longer", "another", "more choices", "tenant"],
)
async def test_a_request_that_cannot_be_begun_keeps_no_pages_of_the_kv_that_came_for_it(
    engine: Engine, wrong: dict[str, Any]
) -> None:
    """Tokens of no vocabulary were noticed when its pages were nobody's any more; a call for another prompt than its
    reservation's had answers from KV that was not its own, which the prefix cache then gave to others.
    """
    transfers, name = Transfers(engine), os.urandom(16)
    servicer = DecodeServicer(engine, transfers, StageMetrics(CollectorRegistry()), "life", "address")  # type: ignore[arg-type]
    transfers.reserve(name, PROMPT, ROOT, 1)
    await transfers.bind(name, 0, 50)
    await transfers.sealed(name, ReceiveStats(1, 1, 50, "grpc"), FIRST)
    fields: dict[str, Any] = {"transfer_id": name, "prompt_ids": PROMPT, "cache_root": ROOT} | wrong
    with pytest.raises((InvalidRequest, ContextLength)):
        await anext(servicer.Decode(decode_pb2.DecodeRequest(**fields), None))  # type: ignore[arg-type, call-overload]
    assert not len(transfers) and not engine.blocks.num_cached
    assert_empty(engine)


@pytest.mark.parametrize("how", ["start_transferred", "resume", "adopt"])
def test_what_the_engine_refuses_gives_back_the_pages_that_come_with_it(engine: Engine, how: str) -> None:
    wrong = [5, engine.config.vocab_size]
    engine.external.pin_prefix(how, [], ROOT)
    engine.external.bind(how, 2)
    table = engine.external.unbind(how)
    with pytest.raises(InvalidRequest):
        match how:
            case "start_transferred":
                engine.start_transferred(Run(wrong).request, table, [])
            case "resume":
                engine.resume(Run([5, 6]).request, [[engine.config.vocab_size]], table)
            case "adopt":
                engine.adopt(wrong, ROOT, table)
    assert_empty(engine)


async def test_promises_that_a_prompt_here_waits_for_end_the_latest_first(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while one is on its way, and not those that have pages."""
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    transfers, names = Transfers(engine), [os.urandom(16) for _ in range(3)]
    claimed = []
    for name in names:
        transfers.reserve(name, PROMPT, ROOT, 1)
        claimed.append(transfers.claim(name))
    waiting = Run(list(range(60, 170)), prefill_only=True)  # 7 of 16 blocks, and 15 are promised
    engine.submit(waiting.request)
    await transfers.bind(names[0], 0, 50)
    engine.step()
    await asyncio.sleep(0.1)
    assert len(transfers) == 3, "one is on its way"
    transfers.end(names[0], Cancelled("test"))
    engine.step()
    assert not waiting.events
    with pytest.raises(Overloaded, match="needed here"):
        await claimed[2].ready
    assert not claimed[1].ready.done()
    while engine.step():
        pass
    assert waiting.events
    engine.cancel(waiting.request)
    transfers.end_all(Cancelled("test"))
    assert_empty(engine)


async def test_no_more_promises_end_than_a_prompt_lacks_and_none_before_the_second_look(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([5, 0, 5, 5])  # blocks that a prompt lacks; each promise is of as many
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    monkeypatch.setattr(engine, "blocks_promised_away", lambda: next(looks, 0))
    transfers, names = Transfers(engine), [os.urandom(16) for _ in range(3)]
    claimed = []
    for name in names:
        transfers.reserve(name, PROMPT, ROOT, 1)
        claimed.append(transfers.claim(name))
    with pytest.raises(Overloaded, match="needed here"):
        await claimed[2].ready
    assert next(looks, None) is None and len(transfers) == 2
    transfers.end_all(Cancelled("test"))
    assert_empty(engine)


async def test_a_claim_keeps_nothing_from_a_queue_with_a_prompt_that_another_worker_has_room_for(
    engine: Engine,
) -> None:
    """Two workers that compute prompts for each other waited, each with what the other's prompts waited for."""
    transfers, prompt = Transfers(engine), [7] * 200
    engine.external.reserve(8)
    for _ in range(2):
        with pytest.raises(Overloaded):
            transfers.reserve(os.urandom(16), prompt, ROOT, 1)
    here, sent = Run([8] * 50, max_tokens=1), Run([9] * 30, prefill_only=True)
    for run in (here, sent):
        engine.submit(run.request)
    for _ in range(5):
        engine.step()
    assert here.events and sent.events
    large = Run([10] * 250, prefill_only=True)
    engine.submit(large.request)
    engine.step()
    engine.cancel(sent.request)
    engine.external.unreserve(8)
    with pytest.raises(Overloaded, match="14 KV blocks wanted, 0 free"):
        transfers.reserve(os.urandom(16), prompt, ROOT, 1)
    engine.cancel(large.request)
    run_all(engine)
    transfers.reserve(name := os.urandom(16), prompt, ROOT, 1)
    transfers.end(name, Cancelled("test"))
    assert_empty(engine)


async def test_tokens_that_were_not_agreed_on_are_refused(engine: Engine) -> None:
    transfers, name = Transfers(engine), os.urandom(16)
    transfers.reserve(name, PROMPT, ROOT, 1)
    with pytest.raises(InvalidRequest, match=r"tokens \[16, 50\) were offered, \[0, 50\) are missing"):
        await transfers.bind(name, 16, 50)
    with pytest.raises(Unavailable):
        await transfers.bind(os.urandom(16), 0, 50)
    transfers.end(name, Cancelled("test"))
    assert_empty(engine)


async def test_nothing_is_written_after_a_transfer_has_ended(engine: Engine) -> None:
    """The worst bug of the field: a late write lands in pages that belong to somebody else by then."""
    transfers, name = Transfers(engine), os.urandom(16)
    transfers.reserve(name, PROMPT, ROOT, 1)
    await transfers.bind(name, 0, 50)
    transfers.failed(name, Unavailable("peer lost"))
    with pytest.raises(Cancelled):
        transfers.scatter(name, (0, 3), (0, 50), wire(50))
    assert torch.isnan(engine.runner.cache.kv).all(), "a free page was written"
    assert_empty(engine)


ACTIONS = ("reserve", "claim", "bind", "scatter", "sealed", "failed", "end", "take")


@settings(max_examples=150)
@example([("reserve", 0), ("claim", 0), ("bind", 0), ("sealed", 0), ("end", 0), ("take", 0)])
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2)), max_size=25))
def test_any_order_of_events_keeps_the_books(engine_for_orders: Engine, steps: list[tuple[str, int]]) -> None:
    """Cancels, timeouts and late messages interleave freely; only PagewireErrors come of it, and no leak."""
    asyncio.run(_interleave(engine_for_orders, steps))
    assert_empty(engine_for_orders)


@pytest.fixture(scope="module")
def engine_for_orders(path: Path) -> Engine:
    return make_engine(path, kv_cache_memory_bytes=384 * 16 * 16)


async def _interleave(engine: Engine, steps: list[tuple[str, int]]) -> None:
    transfers = Transfers(engine)
    names = [os.urandom(16) for _ in range(3)]
    ready: dict[bytes, Any] = {}
    for action, which in steps:
        name = names[which]
        try:
            match action:
                case "reserve":
                    transfers.reserve(name, PROMPT, ROOT, 1)
                case "claim":
                    ready[name] = transfers.claim(name)
                case "bind":
                    await transfers.bind(name, 0, 50)
                case "scatter":
                    transfers.scatter(name, (0, 3), (0, 50), wire(50))
                case "sealed":
                    await transfers.sealed(name, "stats", FIRST)  # type: ignore[arg-type]
                case "failed":
                    transfers.failed(name, Unavailable("lost"))
                case "end":
                    transfers.end(name, Cancelled("stopped"))
                case "take":
                    transfer = ready.get(name)
                    if transfer and transfer.ready.done() and not transfer.ready.exception():
                        engine.blocks.release(transfers.take(ready.pop(name)))
        except PagewireError:
            pass
        tables = engine.external.tables
        engine.blocks.check(tables)
    for name in names:
        transfers.end(name, Cancelled("over"))


def test_a_place_in_the_line_is_kept_by_asking_again() -> None:
    now = 0.0
    line = Line(lambda: now)
    for who, blocks in (("first", 4), ("second", 8), ("first", 3), ("second", 9)):
        now += 0.1
        line.refused(who, blocks)
    now += 0.1
    line.refused("found room elsewhere", 5)
    now += 0.1
    assert [line.before(line.came_at(who)) for who in ("first", "second", "another")] == [[], [3], [3, 9]]
    assert [line.came_at(who) for who in ("first", "another")] == [pytest.approx(0.1), now]
    now = 0.4 + PATIENCE_S
    line.refused("second", 9)
    assert line.before(now) == [9], "the first has not asked for long"
    line.leave("second")
    assert line.before(now) == []
