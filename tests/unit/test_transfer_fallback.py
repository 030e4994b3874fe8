"""A lane that does not come up costs a moment, one over which nothing arrives a transfer; then comes the next one."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from kv_endpoints import FIRST, LAYOUT, Ends, ends, lane_threads, random_kv, until
from pagewire_core.errors import Cancelled, DeadlineExceeded, Unavailable
from pagewire_transfer import lane_thread
from pagewire_transfer.group_lanes import PREFILL_RANK
from pagewire_transfer.lanes import Lane, open_lane
from pagewire_transfer.relay_store import RelayStore

pytestmark = pytest.mark.usefixtures("frozen_heap")


class MuteLane:
    """Says of every chunk that it has been sent, and of those after the first `heard` sends none."""

    def __init__(self, lane: Lane, heard: int) -> None:
        self.name, self.most_bytes = lane.name, lane.most_bytes
        self.staging, self.recv = lane.staging, lane.recv
        self.interrupt, self.close = lane.interrupt, lane.close
        self._send, self._heard = lane.send, heard

    def send(self, wire: torch.Tensor) -> bytes:
        self._heard -= 1
        return self._send(wire) if self._heard >= 0 else b""


def mute(monkeypatch: pytest.MonkeyPatch, name: str, heard: int = 0) -> None:
    """From now on lanes of this name are opened like that."""
    monkeypatch.setattr(
        lane_thread, "open_lane", lambda *args: MuteLane(open_lane(*args), heard if args[0] == name else 1000)
    )


async def moved(both: Ends) -> str:
    """Sends a prompt, which must arrive as it is; over which lane."""
    prompt = random_kv(LAYOUT, 30)
    outgoing = await both.open(prompt)
    stats = await outgoing.seal(FIRST)
    assert torch.equal(both.sink.pages[outgoing.transfer_id], prompt)
    assert stats.bytes == prompt.numel() * 4 == both.sink.done[outgoing.transfer_id].bytes
    assert both.metric("transfer_bytes_total", direction="received", lane=stats.lane) >= stats.bytes
    return stats.lane


async def fails(both: Ends) -> None:
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await moved(both)
    await both.assert_empty()


async def test_after_a_lane_that_never_comes_up_comes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire_transfer.pair.PREFILL_RANK", 1)  # both wait for a rank 0 that never comes
    async with ends("gloo,grpc", timeout_s=1.0) as both:
        assert await asyncio.gather(moved(both), moved(both)) == ["grpc", "grpc"]
        await both.assert_empty()
        assert both.metric("pairs") == 2


async def test_nothing_is_tried_any_more_once_the_sender_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagewire_transfer.pair.PREFILL_RANK", 1)
    async with ends("shm,grpc", timeout_s=60) as both:
        opening = asyncio.create_task(both.open(random_kv(LAYOUT, 4)))
        await until(lambda: both.metric("pairs") == 2)
        await asyncio.wait_for(both.sender.close(), 5)
        with pytest.raises(Unavailable, match="shutting down"):
            await opening
        await until(lambda: both.metric("pairs") == 0 and not lane_threads())


@pytest.mark.parametrize("lane", ["shm", "gloo"])
async def test_nobody_waits_any_more_for_a_chunk_of_a_pair_that_has_ended(
    lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute(monkeypatch, lane)
    monkeypatch.setattr("pagewire_transfer.shm_lane.RECV_TIMEOUT_S", 60)
    monkeypatch.setattr("pagewire_transfer.group_lanes.RECV_TIMEOUT_S", 60)
    async with ends(lane, timeout_s=60) as both:
        (await both.open(random_kv(LAYOUT, 30))).extend(30)
        await until(lambda: both.servicer.staging_slots == 1)
        await both.sender.close()
        await until(lambda: both.servicer.staging_slots == 0 and not lane_threads(), 5)


async def test_after_a_lane_that_carries_nothing_comes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    mute(monkeypatch, "shm")
    async with ends("shm,gloo,grpc", timeout_s=1.0) as both:
        await fails(both)
        assert await moved(both) == await moved(both) == "gloo"


@pytest.mark.parametrize("lanes", ["shm", "shm,nccl"])
async def test_a_lane_that_failed_is_better_than_none(lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been the network; and what else there is does not work with every peer."""
    mute(monkeypatch, "shm")
    async with ends(lanes, timeout_s=1.0) as both:
        await fails(both)
        monkeypatch.undo()
        assert await moved(both) == "shm"


async def test_a_lane_that_has_worked_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are lost in the middle of transfers, and that is not the lane's fault."""
    mute(monkeypatch, "shm", heard=1)
    async with ends("shm,grpc", timeout_s=1.0, chunk_bytes=1000) as both:
        await fails(both)
        monkeypatch.undo()
        assert await moved(both) == "shm"


async def test_a_peer_that_grants_nothing_says_nothing_of_the_lane() -> None:
    async with ends("shm,grpc", timeout_s=1.0) as both:
        both.sink.refuse = Unavailable("no pages")
        await fails(both)
        await both.servicer.release()
        await until(lambda: both.metric("pairs") == 0)
        both.sink.refuse = None
        assert await moved(both) == "shm"


async def test_a_peer_that_gives_up_its_role_while_a_lane_opens_says_nothing_of_the_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts went over a slower lane from then on, for as long as both lived."""
    opened = threading.Event()
    monkeypatch.setattr(lane_thread, "open_lane", lambda *args: opened.wait(20) and open_lane(*args))
    async with ends("shm,grpc") as both:
        opening = asyncio.create_task(both.open(random_kv(LAYOUT, 4)))
        await until(lambda: both.metric("pairs") == 2)  # both ends of one
        giving_up = asyncio.create_task(both.servicer.release())
        await asyncio.sleep(0.05)
        opened.set()
        (await opening).abort(Cancelled("no room"))
        await giving_up
        await until(lambda: both.metric("pairs") == 0)
        assert await moved(both) == "shm"


async def test_a_peer_that_is_lost_before_anything_arrived_says_nothing_of_the_lane() -> None:
    """Frozen for some seconds, it was sent everything over a slower lane from then on, for as long as both lived."""
    stands, goes_on = threading.Event(), threading.Event()

    def stand_still(transfer_id: bytes) -> None:
        stands.set()
        goes_on.wait(20)

    async with ends("shm,grpc") as both:
        both.sink.before = stand_still
        losing = asyncio.create_task(fails(both))
        await until(stands.is_set)
        await both.server.stop(0)
        goes_on.set()
        await losing
        async with both.listening_again():
            assert await moved(both) == "shm"


async def test_workers_that_share_a_gpu_share_memory() -> None:
    async with ends("nccl,shm,gloo,grpc", gpu="GPU-1") as both:
        assert await moved(both) == "shm"


async def test_what_nobody_foresaw_while_a_lane_opens_is_as_if_it_did_not_come_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pair stayed as it was: every later prompt for that peer had the same error, and a thread was lost."""

    def stumble(name: str, store: RelayStore, rank: int, *rest: Any) -> Lane:
        if name == "shm" and rank == PREFILL_RANK:
            raise OverflowError("a port that is none")
        return open_lane(name, store, rank, *rest)

    monkeypatch.setattr(lane_thread, "open_lane", stumble)
    async with ends("shm,grpc") as both:
        assert await moved(both) == "grpc"
        await until(lambda: both.metric("pairs") == 2)
