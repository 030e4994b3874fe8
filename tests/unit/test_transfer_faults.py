"""What breaks ends in one error on each side, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from kv_endpoints import FIRST, LAYOUT, ends, random_kv, until
from pagewire_core.errors import Cancelled, DeadlineExceeded, Incompatible, Internal, Overloaded, Unavailable
from pagewire_transfer import lane_thread
from pagewire_transfer.incoming import Incoming
from pagewire_transfer.lanes import Lane, open_lane
from pagewire_transfer.outgoing import Outgoing

pytestmark = pytest.mark.usefixtures("frozen_heap")

LANES = ("shm", "gloo", "tcp", "grpc")


class DamagingLane:
    """Flips a bit of the received chunks whose number is in `damage`."""

    def __init__(self, lane: Lane, damage: set[int]) -> None:
        self.name, self.most_bytes = lane.name, lane.most_bytes
        self.staging, self.send = lane.staging, lane.send
        self.interrupt, self.close = lane.interrupt, lane.close
        self._recv = lane.recv
        self._damage = damage
        self._received = 0

    @contextlib.contextmanager
    def recv(self, num_bytes: int, inline: bytes, next_bytes: int) -> Iterator[torch.Tensor]:
        with self._recv(num_bytes, inline, next_bytes) as wire:
            if self._received in self._damage:
                wire[num_bytes // 2] ^= 1
            self._received += 1
            yield wire


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of the chunks, as received, that arrive damaged."""
    numbers: set[int] = set()
    monkeypatch.setattr(lane_thread, "open_lane", lambda *args: DamagingLane(open_lane(*args), numbers))
    return numbers


@pytest.mark.parametrize("lane", LANES)
async def test_a_damaged_chunk_is_sent_once_more(lane: str, damage: set[int]) -> None:
    damage.update({1, 4})
    async with ends(lane, chunk_bytes=800, window=1) as both:
        prompt = random_kv(LAYOUT, 30)
        outgoing = await both.open(prompt)
        stats = await outgoing.seal(FIRST)
        assert stats.resent == both.metric("chunk_resends_total") == both.metric("checksum_failures_total") == 2
        assert stats.bytes == prompt.numel() * 4
        assert torch.equal(both.sink.pages[outgoing.transfer_id], prompt)
        await both.assert_empty()


@pytest.mark.parametrize("lane", LANES)
async def test_a_chunk_damaged_twice_fails_the_transfer_which_is_never_sealed(lane: str, damage: set[int]) -> None:
    damage.update({0, 1})
    async with ends(lane) as both:
        outgoing = await both.open(random_kv(LAYOUT, 4))
        with pytest.raises(Unavailable, match="twice"):
            await outgoing.seal(FIRST)
        assert isinstance(both.sink.failures[outgoing.transfer_id], Unavailable)
        assert not both.sink.done
        for direction in ("sent", "received"):
            assert both.metric("transfers_total", direction=direction, outcome="Unavailable") == 1
        await both.assert_empty()
        prompt = random_kv(LAYOUT, 4)  # the pair is still good
        again = await both.open(prompt)
        await again.seal(FIRST)
        assert torch.equal(both.sink.pages[again.transfer_id], prompt)
        assert both.metric("pairs") == 2


async def test_a_peer_that_asks_for_a_chunk_again_and_again_is_not_sent_it_for_ever(
    damage: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.update(range(4))

    def ask_again(self: Incoming, seq: int) -> None:
        self._pending[seq].resend = True

    monkeypatch.setattr(Incoming, "damaged", ask_again)
    async with ends("grpc") as both:
        outgoing = await both.open(random_kv(LAYOUT, 4))
        with pytest.raises(Unavailable, match="twice"):
            await outgoing.seal(FIRST)
        await both.assert_empty()


async def test_a_sink_that_refuses_a_chunk_ends_the_transfer() -> None:
    async with ends("gloo", chunk_bytes=400) as both:
        outgoing = await both.open(random_kv(LAYOUT, 30))
        del both.sink.pages[outgoing.transfer_id]
        with pytest.raises(Cancelled, match="was stopped"):
            await outgoing.seal(FIRST)
        await both.assert_empty()


async def test_closed_waits_for_the_gather_that_is_running() -> None:
    """Blocks released while their gather still runs could be read after they belong to another prompt."""
    async with ends("grpc") as both:
        release = threading.Event()
        both.source.before = lambda _: release.wait(20) and None
        outgoing = await both.open(random_kv(LAYOUT, 4))
        outgoing.extend(4)
        await until(lambda: outgoing.transfer_id in both.source.gathering)
        outgoing.abort(Cancelled("gone"))
        waiting = asyncio.create_task(outgoing.closed())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        release.set()
        await waiting
        assert not both.source.gathering
        await both.assert_empty()


async def test_released_blocks_end_the_transfer() -> None:
    async with ends("grpc") as both:
        outgoing = await both.open(random_kv(LAYOUT, 4))
        both.source.prompts.clear()
        with pytest.raises(Cancelled, match="released"):
            await outgoing.seal(FIRST)
        await until(lambda: outgoing.transfer_id in both.sink.failures)
        await both.assert_empty()


async def test_a_refused_bind_is_the_error_of_open() -> None:
    async with ends("gloo") as both:
        both.sink.refuse = Overloaded("out of pages", retry_after_s=1.5)
        with pytest.raises(Overloaded, match="out of pages") as refused:
            await both.open(random_kv(LAYOUT, 4))
        assert refused.value.retry_after_s == 1.5
        assert not both.sink.failures
        await both.assert_empty()


async def test_a_refused_seal_is_the_error_of_seal() -> None:
    async with ends("gloo") as both:
        both.sink.refuse_seal = Cancelled("stopped at the last moment")
        outgoing = await both.open(random_kv(LAYOUT, 4))
        with pytest.raises(Cancelled, match="last moment"):
            await outgoing.seal(FIRST)
        assert not both.sink.failures
        await both.assert_empty()


@pytest.mark.parametrize("ender", ["prefill cancels", "decode aborts"])
async def test_what_was_bound_after_the_end_is_given_back(ender: str) -> None:
    async with ends("grpc") as both:
        both.sink.hold_bind = asyncio.Event()
        opening = asyncio.create_task(both.open(random_kv(LAYOUT, 4)))
        await until(lambda: both.servicer.open_transfers == 1)
        (transfer_id,) = both.source.prompts
        if ender == "prefill cancels":
            opening.cancel()
        else:
            both.servicer.abort(transfer_id, Cancelled("stopped"))
        with pytest.raises((asyncio.CancelledError, Cancelled)):
            await opening
        await until(lambda: both.servicer.open_transfers == 0)
        both.sink.hold_bind.set()
        await until(lambda: transfer_id in both.sink.failures)
        assert transfer_id not in both.sink.pages
        await both.assert_empty()


async def test_a_bind_that_takes_too_long_is_a_deadline() -> None:
    async with ends("grpc", timeout_s=1.0) as both:
        both.sink.hold_bind = asyncio.Event()
        with pytest.raises(DeadlineExceeded, match="did not grant"):
            await both.open(random_kv(LAYOUT, 4))
        both.sink.hold_bind.set()
        await both.assert_empty()


async def test_a_peer_that_lets_nothing_be_sent_is_dropped() -> None:
    """The transfer waited for as long as somebody waited for it."""
    async with ends("grpc", window=0) as both:
        with pytest.raises(Incompatible, match="room for no chunk"):
            await both.open(random_kv(LAYOUT, 4))
        await both.assert_empty()
        await until(lambda: both.metric("pairs") == 0)


async def test_a_peer_that_acknowledges_nothing_is_dropped() -> None:
    async with ends("grpc", timeout_s=1.0) as both:
        release = threading.Event()
        both.sink.before = lambda _: release.wait(20) and None
        outgoing = await both.open(random_kv(LAYOUT, 4))
        with pytest.raises(DeadlineExceeded, match="acknowledged nothing"):
            await outgoing.seal(FIRST)
        release.set()
        await both.assert_empty()
        await until(lambda: both.metric("pairs") == 0)


async def test_cancelling_seal_aborts_the_transfer() -> None:
    async with ends("gloo", chunk_bytes=400) as both:
        outgoing = await both.open(random_kv(LAYOUT, 30))
        sealing = asyncio.create_task(outgoing.seal(FIRST))
        await asyncio.sleep(0)
        sealing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sealing
        await until(lambda: outgoing.transfer_id in both.sink.failures)
        await both.assert_empty()


async def test_a_bug_in_a_task_of_a_pair_ends_the_pair_and_not_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for these tasks: what they had to do would be left undone for ever."""

    def stumble(outgoing: Outgoing, window: int) -> None:
        raise KeyError("a bug")

    async with ends() as both:
        with monkeypatch.context() as patched:
            patched.setattr(Outgoing, "grant", stumble)
            with pytest.raises(Internal, match="sending KV failed: KeyError"):
                await both.open(random_kv(LAYOUT, 4))
        await both.assert_empty()
        prompt = random_kv(LAYOUT, 4)
        again = await both.open(prompt)
        await again.seal(FIRST)
        assert torch.equal(both.sink.pages[again.transfer_id], prompt)
