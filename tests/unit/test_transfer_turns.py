"""Transfers that share a pair: whose chunk is next, and what an ended one leaves."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
import torch
from kv_endpoints import FIRST, LAYOUT, ends, random_kv, until
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Cancelled
from pagewire_transfer import lane_thread
from pagewire_transfer.lanes import open_lane
from pagewire_transfer.wire import MAX_CHUNK_BYTES

pytestmark = pytest.mark.usefixtures("frozen_heap")


async def test_two_prompts_that_are_ready_take_turns() -> None:
    """Else the one that came first has the lane whenever its window has room."""
    async with ends("grpc", chunk_bytes=400) as both:
        goes_on, order = threading.Event(), list[bytes]()

        def note(transfer_id: bytes) -> None:
            goes_on.wait(20)
            order.append(transfer_id)

        both.source.before = note
        transfers = [await both.open(random_kv(LAYOUT, 30, seed)) for seed in range(2)]
        sealing = [asyncio.create_task(transfer.seal(FIRST)) for transfer in transfers]
        await until(lambda: bool(both.source.gathering))
        goes_on.set()
        await asyncio.gather(*sealing)
        assert all(len({*order[i : i + 3]}) == 2 for i in range(10)), "never three of one before one of the other"


async def test_a_chunk_that_is_not_to_be_sent_any_more_leaves_its_place_to_the_next_transfer() -> None:
    """Nobody acknowledges it: only its own end tells that the lane is free."""
    async with ends("grpc", chunk_bytes=400) as both:
        goes_on, prompt, order = threading.Event(), random_kv(LAYOUT, 30), list[bytes]()
        ended, other = await both.open(random_kv(LAYOUT, 30)), await both.open(prompt)

        def note(transfer_id: bytes) -> None:
            order.append(transfer_id)
            goes_on.wait(20)

        both.source.before = note
        ended.extend(30)
        await until(lambda: ended.transfer_id in both.source.gathering)
        ended.abort(Cancelled("the client has gone"))
        sealing = asyncio.create_task(other.seal(FIRST))
        await asyncio.sleep(0.05)
        goes_on.set()
        await asyncio.wait_for(sealing, 5)
        assert torch.equal(both.sink.pages[other.transfer_id], prompt)
        assert order.count(ended.transfer_id) == 1, "what was not yet being read is not read any more"
        await both.assert_empty()


@pytest.mark.parametrize("how", ["sealed", "aborted"])
async def test_a_pair_keeps_nothing_of_a_transfer_that_has_ended(how: str) -> None:
    """A pair lives as long as its workers."""
    async with ends("grpc", chunk_bytes=400) as both:
        transfer = await both.open(random_kv(LAYOUT, 30))
        if how == "sealed":
            await transfer.seal(FIRST)
        else:
            transfer.extend(9)
            transfer.abort(Cancelled("the client has gone"))
            await transfer.closed()
        left = weakref.ref(transfer)
        del transfer

        def gone() -> bool:
            gc.collect()
            return left() is None

        await until(gone)
        assert both.metric("pairs") == 2


async def test_blocks_that_are_released_end_their_transfer_and_not_its_neighbour() -> None:
    async with ends("grpc", chunk_bytes=400) as both:
        prompt = random_kv(LAYOUT, 30)
        lost, other = await both.open(random_kv(LAYOUT, 30)), await both.open(prompt)
        del both.source.prompts[lost.transfer_id]
        with pytest.raises(Cancelled, match="released"):
            await lost.seal(FIRST)
        await other.seal(FIRST)
        assert torch.equal(both.sink.pages[other.transfer_id], prompt)


async def test_transfers_that_have_nothing_to_send_hold_up_none_that_has() -> None:
    async with ends("grpc") as both:
        for _ in range(20):
            await both.open(random_kv(LAYOUT, 4))
        ready = await both.open(random_kv(LAYOUT, 4))
        await asyncio.wait_for(ready.seal(FIRST), 4)


async def test_what_crosses_our_abort_on_its_way_ends_no_other_transfer() -> None:
    async with ends("grpc") as both:
        gone, other = await both.open(random_kv(LAYOUT, 4)), await both.open(random_kv(LAYOUT, 4))
        [pair] = both.servicer._pairs
        gone.abort(Cancelled("the client has gone"))
        for message in ("grant", "chunk_ack", "sealed_ack", "abort"):
            pair._send(**{message: {"transfer_id": gone.transfer_id}})  # type: ignore[arg-type]
        await other.seal(FIRST)
        assert both.metric("pairs") == 2


async def test_a_sender_that_closes_waits_for_the_gather_that_runs() -> None:
    """Blocks are given back after it."""
    async with ends("grpc") as both:
        goes_on = threading.Event()
        both.source.before = lambda _: goes_on.wait(20) and None
        transfer = await both.open(random_kv(LAYOUT, 4))
        transfer.extend(4)
        await until(lambda: bool(both.source.gathering))
        closing = asyncio.create_task(both.sender.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        goes_on.set()
        await closing
        assert not both.source.gathering


@pytest.mark.parametrize("lane", ["shm", "gloo", "tcp", "grpc"])
async def test_a_chunk_is_no_larger_than_its_lane_takes(lane: str) -> None:
    layout = kv.KvLayout(num_layers=3, num_kv_heads=8, head_dim=64, dtype="float32")
    async with ends(lane, layout, chunk_bytes=MAX_CHUNK_BYTES) as both:
        prompt = random_kv(layout, 800)
        transfer = await both.open(prompt)
        stats = await transfer.seal(FIRST)
        assert stats.bytes == 9_830_400
        assert torch.equal(both.sink.pages[transfer.transfer_id], prompt)


async def test_a_pair_that_sends_or_is_about_to_stays_when_the_sender_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = threading.Event()
    monkeypatch.setattr(lane_thread, "open_lane", lambda *args: opened.wait(20) and open_lane(*args))
    async with ends("grpc") as both:
        opening = asyncio.create_task(both.open(random_kv(LAYOUT, 4)))
        await until(lambda: both.metric("pairs") == 2)
        await asyncio.wait_for(both.sender.release(), 4)
        opened.set()
        transfer = await opening
        await asyncio.wait_for(both.sender.release(), 4)
        await transfer.seal(FIRST)
        await asyncio.wait_for(both.sender.release(), 4)
        assert not both.sender._pairs
