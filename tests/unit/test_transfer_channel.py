"""A prefill worker's KV arrives in a decode worker, byte for byte, over each lane."""

from __future__ import annotations

import asyncio

import pytest
import torch
from kv_endpoints import FIRST, LAYOUT, ends, held_by_process, lane_threads, new_id, random_kv, until
from pagewire.v1 import kv_channel_pb2 as kv

pytestmark = pytest.mark.usefixtures("frozen_heap")

LANES = ("shm", "gloo", "tcp", "grpc")


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("layers", "heads", "dim", "dtype", "tokens", "begin"),
    [
        (1, 1, 1, "float32", 1, 0),
        (3, 2, 8, "float32", 37, 5),
        (5, 1, 6, "bfloat16", 64, 0),
        (2, 4, 16, "float16", 3, 2),
    ],
)
async def test_every_byte_arrives_whatever_the_shape(
    lane: str, layers: int, heads: int, dim: int, dtype: str, tokens: int, begin: int
) -> None:
    layout = kv.KvLayout(num_layers=layers, num_kv_heads=heads, head_dim=dim, dtype=dtype)
    async with ends(lane, layout, chunk_bytes=1000) as both:
        prompt = random_kv(layout, tokens)
        outgoing = await both.open(prompt, begin)
        stats = await outgoing.seal(FIRST)
        tid = outgoing.transfer_id
        sent = prompt[:, :, begin:]
        assert torch.equal(both.sink.pages[tid], sent)
        assert stats.bytes == both.sink.done[tid].bytes == sent.numel() * sent.element_size() > 0
        assert stats.chunks == both.sink.done[tid].chunks
        assert stats.lane == both.sink.done[tid].lane == lane
        assert both.sink.done[tid].tokens == tokens - begin
        assert both.sink.first_tokens[tid] == FIRST
        assert both.metric("transfer_bytes_total", direction="sent", lane=lane) == stats.bytes
        assert both.metric("transfer_bytes_total", direction="received", lane=lane) == stats.bytes
        assert both.metric("transfers_total", direction="received", outcome="ok") == 1
        assert both.metric("pairs") == 2
        await both.assert_empty()
    assert both.metric("pairs") == 0


@pytest.mark.parametrize("lane", LANES)
async def test_tokens_are_sent_as_they_become_final_and_not_before(lane: str) -> None:
    async with ends(lane, chunk_bytes=800) as both:
        prompt = random_kv(LAYOUT, 40)
        outgoing = await both.open(prompt)
        tid = outgoing.transfer_id
        outgoing.extend(16)
        await until(lambda: not both.sink.pages[tid][:, :, :16].isnan().any())
        await asyncio.sleep(0.02)
        assert both.sink.pages[tid][:, :, 16:].isnan().all()
        outgoing.extend(17)
        outgoing.extend(17)
        await until(lambda: not both.sink.pages[tid][:, :, :17].isnan().any())
        await outgoing.seal(FIRST)
        assert torch.equal(both.sink.pages[tid], prompt)


@pytest.mark.parametrize("lane", LANES)
async def test_a_transfer_of_nothing_is_still_sealed(lane: str) -> None:
    """Every token is in the decode worker's own cache: only the first tokens have to cross."""
    async with ends(lane) as both:
        outgoing = await both.open(random_kv(LAYOUT, 12), begin=12)
        stats = await outgoing.seal(FIRST)
        assert (stats.bytes, stats.chunks) == (0, 0)
        assert both.sink.done[outgoing.transfer_id].tokens == 0
        assert both.sink.first_tokens[outgoing.transfer_id] == FIRST
        await both.assert_empty()


@pytest.mark.parametrize("lane", LANES)
async def test_concurrent_transfers_share_one_pair(lane: str) -> None:
    async with ends(lane, chunk_bytes=700, window=2) as both:
        prompts = [random_kv(LAYOUT, 20 + 7 * i, seed=i) for i in range(6)]
        outgoings = await asyncio.gather(*(both.open(prompt) for prompt in prompts))
        assert both.sender.open_transfers == both.servicer.open_transfers == 6
        await asyncio.gather(*(outgoing.seal(FIRST) for outgoing in outgoings))
        assert both.metric("pairs") == 2
        for outgoing, prompt in zip(outgoings, prompts, strict=True):
            assert torch.equal(both.sink.pages[outgoing.transfer_id], prompt)
        await both.assert_empty()


async def test_a_slow_sink_holds_the_sender_back() -> None:
    """Staging stays bounded: a chunk is gathered only when the window has room for it."""
    async with ends("grpc", chunk_bytes=500, window=2) as both:
        release = asyncio.Event()
        loop = asyncio.get_running_loop()
        both.sink.before = lambda _: asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        outgoing = await both.open(random_kv(LAYOUT, 50))
        sealing = asyncio.create_task(outgoing.seal(FIRST))
        await until(lambda: both.source.gathers == 2)
        await asyncio.sleep(0.05)
        assert both.source.gathers == 2
        release.set()
        await sealing
        await both.assert_empty()


async def test_gloo_and_threads_leave_nothing_behind_after_many_pairs() -> None:
    async def one_pair() -> None:
        async with ends("gloo") as both:
            outgoing = await both.open(random_kv(LAYOUT, 8))
            await outgoing.seal(FIRST)

    await one_pair()
    fds, threads = held_by_process()
    for _ in range(10):
        await one_pair()
    await until(lambda: not lane_threads())
    # gRPC keeps a few of its own for a while; ten leaked Gloo pairs would be 50 descriptors and 30 threads.
    await until(lambda: held_by_process()[0] <= fds + 4 and held_by_process()[1] <= threads + 4)


async def test_a_transfer_id_is_open_only_once_on_a_decode_worker() -> None:
    async with ends("grpc") as both, ends("grpc") as other:
        outgoing = await both.open(random_kv(LAYOUT, 4))
        other.source.prompts[outgoing.transfer_id] = random_kv(LAYOUT, 4)
        with pytest.raises(Exception, match="has this transfer open"):
            await other.sender.open(outgoing.transfer_id, both.address, both.instance, (0, 4))
        await outgoing.seal(FIRST)
        assert new_id() != outgoing.transfer_id
