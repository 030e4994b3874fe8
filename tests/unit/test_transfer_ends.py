"""A transfer may end at any stage, by either side's will or death, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from kv_endpoints import FIRST, LAYOUT, Ends, ends, lane_threads, new_id, random_kv, until
from pagewire_core.errors import Cancelled, Unavailable
from pagewire_transfer.sender import Outgoing

pytestmark = pytest.mark.usefixtures("frozen_heap")

LANES = ("shm", "gloo", "tcp", "grpc")


async def while_unextended(both: Ends) -> Outgoing:
    return await both.open(random_kv(LAYOUT, 30))


async def while_streaming(both: Ends) -> Outgoing:
    outgoing = await both.open(random_kv(LAYOUT, 30))
    outgoing.extend(10)
    await until(lambda: not both.sink.pages[outgoing.transfer_id][:, :, 0].isnan().any())
    outgoing.extend(20)
    return outgoing


async def with_chunks_queued(both: Ends) -> Outgoing:
    outgoing = await both.open(random_kv(LAYOUT, 30))
    outgoing.extend(30)
    return outgoing


STAGES = (while_unextended, while_streaming, with_chunks_queued)
Stage = Callable[[Ends], Awaitable[Outgoing]]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("stage", STAGES)
async def test_the_prefill_side_may_abort_at_any_stage(lane: str, stage: Stage) -> None:
    async with ends(lane, chunk_bytes=400) as both:
        outgoing = await stage(both)
        outgoing.abort(Cancelled("the client has gone"))
        outgoing.abort(Unavailable("a second abort changes nothing"))
        await asyncio.wait_for(outgoing.closed(), 4)
        gathers = both.source.gathers
        await until(lambda: outgoing.transfer_id in both.sink.failures)
        assert both.sink.failures[outgoing.transfer_id].message == "the client has gone"
        with pytest.raises(Cancelled, match="client has gone"):
            await outgoing.seal(FIRST)
        assert both.source.gathers == gathers
        assert both.metric("transfers_total", direction="sent", outcome="Cancelled") == 1
        await both.assert_empty()
        await (await both.open(random_kv(LAYOUT, 9))).seal(FIRST)  # the pair outlives it
        assert both.metric("pairs") == 2


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("stage", STAGES)
async def test_the_decode_side_may_abort_at_any_stage(lane: str, stage: Stage) -> None:
    async with ends(lane, chunk_bytes=400) as both:
        outgoing = await stage(both)
        both.servicer.abort(outgoing.transfer_id, Cancelled("stopped"))
        both.servicer.abort(outgoing.transfer_id, Cancelled("stopped"))
        with pytest.raises(Cancelled, match="stopped"):
            await outgoing.seal(FIRST)
        await outgoing.closed()
        assert not both.sink.done and not both.sink.failures
        await both.assert_empty()
        await (await both.open(random_kv(LAYOUT, 9))).seal(FIRST)
        assert both.metric("pairs") == 2


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("stage", STAGES)
async def test_a_lost_decode_worker_fails_the_transfer_and_its_successor_gets_a_new_pair(
    lane: str, stage: Stage
) -> None:
    async with ends(lane, chunk_bytes=400) as both:
        outgoing = await stage(both)
        await both.server.stop(0)
        async with asyncio.timeout(4):
            with pytest.raises(Unavailable):
                await outgoing.seal(FIRST)
            await outgoing.closed()
        assert outgoing.transfer_id in both.sink.failures
        await both.assert_empty()
        await until(lambda: both.metric("pairs") == 0)
        with pytest.raises(Unavailable):
            await both.open(random_kv(LAYOUT, 4))
        port = int(both.address.rpartition(":")[2])
        async with ends(lane, port=port) as successor:
            both.source.prompts[tid := new_id()] = random_kv(LAYOUT, 4)
            again = await both.sender.open(tid, both.address, both.instance, (0, 4))
            await again.seal(FIRST)
            assert tid in successor.sink.done


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("stage", STAGES)
async def test_a_prefill_worker_that_leaves_fails_its_transfers(lane: str, stage: Stage) -> None:
    async with ends(lane, chunk_bytes=400) as both:
        outgoing = await stage(both)
        await asyncio.wait_for(both.sender.close(), 4)
        assert isinstance(outgoing.error, Unavailable)
        await until(lambda: outgoing.transfer_id in both.sink.failures, 4)
        assert isinstance(both.sink.failures[outgoing.transfer_id], Unavailable)
        await both.assert_empty()
        await until(lambda: not lane_threads())
        with pytest.raises(Unavailable, match="shutting down"):
            await both.open(random_kv(LAYOUT, 4))


KILLED_SENDER = """
import asyncio, sys, torch
sys.path.append(sys.argv[3])
from kv_endpoints import LAYOUT, Source, identity, random_kv
from pagewire_transfer.metrics import TransferMetrics
from pagewire_transfer.sender import KvSender
from prometheus_client import CollectorRegistry

async def main():
    prompt = random_kv(LAYOUT, 2000)
    source = Source({b"k" * 16: prompt})
    metrics = TransferMetrics(CollectorRegistry())
    sender = KvSender(identity("prefill"), source, lanes=["gloo"], metrics=metrics, timeout_s=5, chunk_bytes=2000)
    outgoing = await sender.open(b"k" * 16, sys.argv[1], sys.argv[2], (0, 2000))
    outgoing.extend(2000)
    await outgoing.closed()

asyncio.run(main())
"""


async def test_a_killed_prefill_worker_fails_its_transfer_at_once() -> None:
    """Gloo alone may notice at its timeout only: the control stream is the failure detector."""
    async with ends("gloo") as both:
        tests = str(Path(__file__).parent.parent)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED_SENDER, both.address, both.instance, tests
        )
        tid = b"k" * 16
        await until(lambda: tid in both.sink.pages and not both.sink.pages[tid][:, :, 0].isnan().any(), 30)
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: tid in both.sink.failures, 4)
        await child.wait()
        assert isinstance(both.sink.failures[tid], Unavailable)
        await until(lambda: both.held() == (0, 0, 0, 0), 20)  # a chunk in mid-transfer holds its slot for 5 s


async def test_an_offer_that_comes_while_the_receiver_lets_go_does_not_keep_it() -> None:
    """A worker once waited for such a pair to end for as long as it lived, and its change of role with it."""
    async with ends("shm") as both:
        both.sink.hold_bind = asyncio.Event()
        opening = asyncio.create_task(both.open(random_kv(LAYOUT, 9)))
        await until(lambda: both.servicer.open_transfers == 1)
        both.sink.refuse = Cancelled("this transfer was stopped")
        releasing = asyncio.create_task(both.servicer.release())
        await asyncio.sleep(0)
        both.sink.hold_bind.set()
        with pytest.raises(Cancelled, match="stopped"):
            await opening
        await asyncio.wait_for(releasing, 20)
        await until(lambda: both.metric("pairs") == 0 and not lane_threads())


async def test_a_pair_that_goes_on_to_receive_stays_when_the_receiver_lets_go() -> None:
    async with ends("shm") as both:
        outgoing = await both.open(random_kv(LAYOUT, 9))
        await asyncio.wait_for(both.servicer.release(), 20)
        await outgoing.seal(FIRST)
        assert both.sink.done[outgoing.transfer_id].tokens == 9
