"""A prompt's beginning comes from a worker that has it; whatever goes wrong, it is computed, and no token differs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ROOT, Run, make_engine, run_all
from kv_endpoints import until
from otlp_sink import children, listening
from pagewire.v1 import common_pb2, prefill_pb2
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core import tracing
from pagewire_core.errors import Cancelled, InvalidRequest, Overloaded, Unavailable
from pagewire_transfer import lane_thread
from pagewire_transfer.lanes import Lane, open_lane
from pagewire_worker.prefixes import PrefixLender
from peers import Peer, compute, hand_over, peer
from tiny_models import VOCAB, make_model

HELD = 128  # of PROMPT, two hash blocks
PROMPT = [random.Random(7).randrange(5, VOCAB) for _ in range(170)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[int]:
    run = Run(PROMPT, ignore_eos=True)
    run_all(make_engine(llama), run)
    return run.tokens()


@dataclass
class Scene:
    """`holder` has PROMPT in its prefix cache; the others have nothing."""

    holder: Peer
    worker: Peer
    target: Peer

    def computed(self) -> int:
        """Prompt tokens that the worker computed."""
        return self.worker.engine.counters.prompt_tokens_computed

    async def assert_empty(self) -> None:
        for each in (self.holder, self.worker, self.target):
            await each.assert_empty()


@contextlib.asynccontextmanager
async def scene(llama: Path, lane: str = "grpc") -> AsyncIterator[Scene]:
    async with (
        peer(llama, "holder", lane=lane, chunk_bytes=4096) as holder,
        peer(llama, "worker", lane=lane) as worker,
        peer(llama, "target", lane=lane) as target,
    ):
        await compute(PROMPT, holder)
        await holder.assert_empty()
        yield Scene(holder, worker, target)


@pytest.mark.parametrize("lane", ["shm", "gloo", "grpc"])
async def test_what_a_peer_holds_is_fetched_and_not_computed(lane: str, llama: Path, expected: list[int]) -> None:
    async with scene(llama, lane) as s:
        answer = await hand_over(PROMPT, s.worker, s.target, holder=s.holder.holds(HELD))
        assert answer.tokens == expected
        fetched = answer.started.fetched
        bytes_per_token = s.worker.engine.runner.cache.bytes_per_token
        assert (fetched.tokens, fetched.bytes, fetched.lane) == (HELD, HELD * bytes_per_token, lane)
        assert answer.started.cached_tokens == HELD and s.computed() == len(PROMPT) - HELD
        assert s.worker.metric("fetches_total", outcome="ok") == 1
        await s.assert_empty()
        again = await compute(PROMPT, s.worker, s.holder.holds(HELD))  # it has that now, and more
        assert again.tokens == expected and not again.started.fetched.tokens
        assert s.worker.metric("fetches_total", outcome="not needed") == 1
        await s.assert_empty()


async def test_a_request_without_a_holder_fetches_nothing_and_counts_as_nothing(llama: Path) -> None:
    """Outcomes are there from the start, so that the first fetch is an increase."""
    async with peer(llama, "worker") as worker:
        alone = await compute(PROMPT, worker)
        assert alone.started.fetched == common_pb2.Fetched()
        for outcome in ("ok", "not needed", "given up", "failed"):
            assert worker.registry.get_sample_value("pagewire_kv_fetches_total", {"outcome": outcome}) == 0
        await worker.assert_empty()


async def test_a_fetch_may_take_longer_than_a_lease_and_says_how_long(
    llama: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagewire_decode.transfers.LEASE_S", 0.05)
    async with scene(llama) as s:
        lend = s.holder.receiver.lend

        async def slowly(request: kv.FetchRequest) -> kv.FetchResponse:
            await asyncio.sleep(0.2)
            return await lend(request)

        s.holder.receiver.lend = slowly
        alone = await compute(PROMPT, s.worker, s.holder.holds(HELD))
        assert alone.tokens == expected and alone.started.fetched.tokens == HELD
        assert 200_000 <= alone.started.fetched.fetch_us < 5_000_000
        await s.assert_empty()


@pytest.mark.parametrize("wrong", [{"transfer_id": b"short"}, {"token_begin": HELD + 1}])
async def test_a_fetch_that_makes_no_sense_is_refused_and_holds_nothing(wrong: dict[str, Any], llama: Path) -> None:
    fields: dict[str, Any] = {"transfer_id": os.urandom(16), "prompt_ids": PROMPT[:HELD], "cache_root": ROOT} | wrong
    async with scene(llama) as s:
        with pytest.raises(Unavailable, match="a transfer id of 16 bytes and a range of tokens"):
            await s.holder.lender.lend(s.holder.sender, kv.FetchRequest(**fields))
        await s.assert_empty()


def test_what_is_no_longer_lent_is_not_read(llama: Path) -> None:
    with pytest.raises(Cancelled, match="no longer lent"):
        PrefixLender(make_engine(llama)).gather(os.urandom(16), (0, 1), (0, 16), torch.empty(0))


async def test_a_worker_that_decodes_alone_fetches_too(llama: Path, expected: list[int]) -> None:
    async with scene(llama) as s:
        alone = await compute(PROMPT, s.worker, s.holder.holds(HELD))
        assert alone.tokens == expected
        assert alone.started.fetched.tokens == HELD and s.computed() == len(PROMPT) - HELD
        await s.assert_empty()


@pytest.mark.parametrize("alone", [True, False])
async def test_prompts_whose_beginnings_fill_the_pool_do_not_wait_for_each_other(llama: Path, alone: bool) -> None:
    """Each held what was fetched for it while it waited for the blocks that the others held: none ever began."""
    prompts = [[random.Random(seed).randrange(5, VOCAB) for _ in PROMPT] for seed in range(3)]
    small = 26 * 384 * 16  # bytes of 26 blocks: a prompt and its output take 12, a beginning 8
    async with (
        peer(llama, "holder") as holder,
        peer(llama, "worker", kv_cache_memory_bytes=small) as worker,
        peer(llama, "target") as target,
    ):
        expected = [(await compute(prompt, holder)).tokens for prompt in prompts]
        held = holder.holds(HELD)
        async with asyncio.timeout(20):
            if alone:
                answers = await asyncio.gather(*(compute(prompt, worker, held) for prompt in prompts))
            else:
                answers = await asyncio.gather(*(hand_over(p, worker, target, holder=held) for p in prompts))
        assert [answer.tokens for answer in answers] == expected
        assert worker.metric("fetches_total", outcome="ok") == 3
        assert max(answer.started.cached_tokens for answer in answers) == HELD, "fetched and not used"
        for each in (holder, worker, target):
            await each.assert_empty()


async def test_what_was_fetched_is_still_there_when_its_prompt_has_waited(llama: Path, expected: list[int]) -> None:
    async with scene(llama) as s:
        engine = s.worker.engine
        promised = engine.blocks.num_blocks - 10  # room for the beginning, not for the prompt
        engine.external.reserve(promised)
        asking = asyncio.create_task(compute(PROMPT, s.worker, s.holder.holds(HELD)))
        await until(lambda: engine.load()["num_waiting"] == 1)
        engine.external.unreserve(promised)
        alone = await asking
        assert alone.tokens == expected and alone.started.cached_tokens == HELD
        await s.assert_empty()


async def test_a_worker_that_takes_no_calls_any_more_begins_none_that_was_still_fetching(
    llama: Path, halted: threading.Event
) -> None:
    """A drain saw no call and said that the worker was drained; then one began."""
    async with scene(llama) as s:
        request = prefill_pb2.PrefillRequest(
            transfer_id=bytes(16), prompt_ids=PROMPT, cache_root=ROOT, decode_address=s.target.address,
            holder=s.holder.holds(HELD, 20),
        )  # fmt: skip
        responses = s.worker.prefill.Prefill(request, None)  # type: ignore[arg-type]
        asking = asyncio.ensure_future(anext(aiter(responses)))
        assert await asyncio.to_thread(halted.wait, 30)
        s.worker.prefill.refusing = True
        halted.over.set()  # type: ignore[attr-defined]
        with pytest.raises(Overloaded):
            await asking
        assert not s.computed()
        await s.assert_empty()


async def test_a_worker_that_caches_nothing_fetches_nothing(llama: Path, expected: list[int]) -> None:
    """It fetched the beginning, dropped it, and computed it."""
    async with peer(llama, "holder") as holder, peer(llama, "worker", enable_prefix_caching=False) as worker:
        await compute(PROMPT, holder)
        alone = await compute(PROMPT, worker, holder.holds(HELD))
        assert alone.tokens == expected and alone.started.cached_tokens == 0
        assert not alone.started.fetched.tokens and not holder.metric("pairs")


async def test_a_fetch_under_an_id_that_is_in_use_is_refused(llama: Path) -> None:
    """It took the place of what was held under that id: the blocks were lost, or a request had those of another."""
    async with scene(llama) as s:
        incoming = s.holder.transfers.reserve(os.urandom(16), PROMPT, ROOT, 1)
        fetch = kv.FetchRequest(
            transfer_id=incoming.transfer_id, prompt_ids=PROMPT[:64], cache_root=ROOT, address=s.worker.address,
            instance="worker-life-1", expect_instance="holder-life-1",
        )  # fmt: skip
        with pytest.raises(InvalidRequest, match="in use"):
            await s.holder.receiver.Fetch(fetch, None)  # type: ignore[arg-type]
        assert len(s.holder.engine.external.table(incoming.transfer_id)) * 16 == incoming.local_tokens == 160
        s.holder.transfers.end(incoming.transfer_id, Cancelled("test"))
        await s.assert_empty()


async def test_only_what_is_missing_crosses(llama: Path, expected: list[int]) -> None:
    async with scene(llama) as s:
        await compute(PROMPT[:80], s.worker)  # has 5 blocks of 16 then
        before = s.computed()
        alone = await compute(PROMPT, s.worker, s.holder.holds(HELD))
        assert alone.tokens == expected
        assert alone.started.fetched.tokens == HELD - 80 and s.computed() - before == len(PROMPT) - HELD
        await s.assert_empty()


async def test_a_fetch_is_part_of_its_requests_trace(llama: Path) -> None:
    with listening() as (sink, endpoint), contextlib.closing(tracing):
        async with scene(llama) as s:
            tracing.configure("worker", endpoint)
            await compute(PROMPT, s.worker, s.holder.holds(HELD))
            await s.assert_empty()
        tracing.close()
    [call] = [span for span in sink.spans if not span.parent_id]
    path = [call]
    for name in ("fetch", "pagewire.v1.KvChannelService/Fetch", "transfer", "receive"):
        path += children(sink.spans, path[-1], name)
    assert [span.kind for span in path] == ["server", "client", "server", "client", "server"]
    assert path[1]["pagewire.holder"] == "holder" and path[-1]["pagewire.transferred_tokens"] == HELD
    [prefill] = children(sink.spans, call, "prefill")
    assert (prefill["pagewire.cached_tokens"], prefill["pagewire.computed_tokens"]) == (HELD, len(PROMPT) - HELD)


async def check_computed(s: Scene, expected: list[int], timeout_s: float = 5.0) -> None:
    """It was asked for, did not come, and the answer is right all the same."""
    alone = await compute(PROMPT, s.worker, s.holder.holds(HELD, timeout_s))
    assert alone.tokens == expected
    assert not alone.started.fetched.tokens and s.computed() == len(PROMPT)
    assert s.worker.metric("fetches_total", outcome="failed") == 1
    await s.assert_empty()


async def test_what_the_holder_has_evicted_is_computed(llama: Path, expected: list[int]) -> None:
    async with scene(llama) as s:
        s.holder.engine.blocks.reset_cache()
        await check_computed(s, expected)


async def test_a_holder_lends_all_that_it_is_asked_for_or_nothing(llama: Path) -> None:
    async with scene(llama) as s:
        blocks = s.holder.engine.blocks
        taken = blocks.allocate(blocks.num_free - 6)
        request = kv.FetchRequest(transfer_id=os.urandom(16), prompt_ids=PROMPT[:HELD], cache_root=ROOT)
        with pytest.raises(Unavailable, match="96 tokens of the prefix are here, not 128"):
            await s.holder.lender.lend(s.holder.sender, request)
        blocks.release(taken)
        await s.assert_empty()


async def test_a_holder_that_is_gone_is_done_without(llama: Path, expected: list[int]) -> None:
    async with scene(llama) as s:
        await s.holder.server.stop(0)
        await check_computed(s, expected)


async def test_another_life_of_the_holder_is_not_asked(llama: Path, expected: list[int]) -> None:
    async with scene(llama) as s:
        named = s.holder.holds(HELD)
        named.instance = "holder-life-0"
        alone = await compute(PROMPT, s.worker, named)
        assert alone.tokens == expected and not alone.started.fetched.tokens
        await s.assert_empty()


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when a holder has sent some chunks; it then goes on with the next only after the test."""
    reached, over = threading.Event(), threading.Event()
    gathers = 0
    from pagewire_worker.prefixes import PrefixLender

    gather = PrefixLender.gather

    def halting(self: PrefixLender, *args: object) -> None:
        nonlocal gathers
        gathers += 1
        if gathers > 3:
            reached.set()
            over.wait(30)
        gather(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PrefixLender, "gather", halting)
    reached.over = over  # type: ignore[attr-defined]
    yield reached
    over.set()


async def test_a_holder_that_stands_still_costs_no_longer_than_computing(
    llama: Path, expected: list[int], halted: threading.Event
) -> None:
    async with scene(llama) as s:
        asking = asyncio.create_task(compute(PROMPT, s.worker, s.holder.holds(HELD, 2)))
        assert await asyncio.to_thread(halted.wait, 30)
        alone = await asking
        assert alone.tokens == expected and not alone.started.fetched.tokens
        assert s.worker.metric("fetches_total", outcome="given up") == 1
        halted.over.set()  # type: ignore[attr-defined]
        await s.assert_empty()


async def test_a_holder_that_dies_in_the_middle_costs_nothing_but_time(
    llama: Path, expected: list[int], halted: threading.Event
) -> None:
    async with scene(llama) as s:
        asking = asyncio.create_task(compute(PROMPT, s.worker, s.holder.holds(HELD, 20)))
        assert await asyncio.to_thread(halted.wait, 30)
        stopping = asyncio.gather(s.holder.server.stop(0), s.holder.sender.close())
        halted.over.set()  # type: ignore[attr-defined]
        await stopping
        alone = await asking
        assert alone.tokens == expected and not alone.started.fetched.tokens
        assert s.computed() == len(PROMPT)
        await s.assert_empty()


async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind(llama: Path, halted: threading.Event) -> None:
    async with scene(llama) as s:
        asking = asyncio.create_task(compute(PROMPT, s.worker, s.holder.holds(HELD, 20)))
        assert await asyncio.to_thread(halted.wait, 30)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: not s.holder.sender.open_transfers)
        assert s.holder.engine.blocks.num_held, "they are still being read"
        halted.over.set()  # type: ignore[attr-defined]
        await s.assert_empty()


class _Damaging:
    """Flips a bit of every chunk that it receives."""

    def __init__(self, lane: Lane) -> None:
        self.name, self.most_bytes = lane.name, lane.most_bytes
        self.staging, self.send = lane.staging, lane.send
        self.interrupt, self.close, self._recv = lane.interrupt, lane.close, lane.recv

    @contextlib.contextmanager
    def recv(self, num_bytes: int, inline: bytes, next_bytes: int) -> Iterator[torch.Tensor]:
        with self._recv(num_bytes, inline, next_bytes) as wire:
            wire[num_bytes // 2] ^= 1
            yield wire


async def test_damaged_kv_never_becomes_a_token(
    llama: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_thread, "open_lane", lambda *args: _Damaging(open_lane(*args)))
    async with scene(llama) as s:
        await check_computed(s, expected)
        assert s.worker.metric("checksum_failures_total") >= 2
