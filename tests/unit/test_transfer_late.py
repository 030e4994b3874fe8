"""What a decode worker hears late, or more of than it has room for."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
import torch
from kv_endpoints import LAYOUT, ends, identity, new_id, random_kv, until
from liars import TID, TOKENS, Liar, a_chunk, liar, the_seal
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import KvChannelServiceStub
from pagewire_core.errors import Incompatible
from pagewire_core.rpc import open_channel
from pagewire_transfer import receiving_pair
from pagewire_transfer.wire import checksum, to_bytes

pytestmark = pytest.mark.usefixtures("frozen_heap")


async def test_a_peer_that_opens_too_many_transfers_loses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving_pair, "_MAX_OPEN", 2)
    async with ends("grpc", window=2) as both, liar(both) as peer:
        both.sink.hold_bind = asyncio.Event()
        for _ in range(2):
            await peer.say(offer=kv.Offer(transfer_id=new_id(), token_end=TOKENS))
        await peer.ends_with(Incompatible, "more than 2 transfers at once")
        both.sink.hold_bind.set()
        await until(lambda: len(both.sink.failures) == 2)
        await both.assert_empty()


async def test_a_peer_that_reads_nothing_loses_its_transfers_though_it_never_hears_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is to be told waits for it to read; the pages of its transfers once did, too."""
    monkeypatch.setattr(receiving_pair, "_MAX_UNREAD", 50)
    async with ends("grpc", window=2) as both, liar(both, granted=False) as other:
        await other.say(offer=kv.Offer(transfer_id=new_id(), token_end=TOKENS))
        taken = (await other.hear()).grant.transfer_id
        # Its end of the stream takes 64 KiB and no more.
        async with grpc.aio.insecure_channel(both.address, options=[("grpc.http2.bdp_probe", 0)]) as channel:
            peer = Liar(KvChannelServiceStub(channel).Connect())
            await peer.greet(both.instance)
            await peer.say(offer=kv.Offer(transfer_id=TID, token_end=TOKENS))
            refused = asyncio.create_task(peer.say_again(offer=kv.Offer(transfer_id=taken, token_end=TOKENS)))
            await until(lambda: TID in both.sink.failures)
            refused.cancel()
            assert "reads nothing" in both.sink.failures[TID].message
            assert both.servicer.open_transfers == 1, "of the peer that reads"


@pytest.mark.parametrize("greets", [True, False])
async def test_bytes_that_are_no_message_are_the_peers_fault(greets: bool) -> None:
    async with ends("grpc") as both, open_channel(both.address) as channel:
        call = channel.stream_stream("/pagewire.v1.KvChannelService/Connect")()  # bytes in, bytes out
        if greets:
            hello = identity("liar").hello(both.instance, ["grpc"])
            await call.write(kv.ConnectRequest(hello=hello).SerializeToString())
            await call.read()
        await call.write(b"\xff\xff\xff")
        await Liar(call).ends_with(Incompatible, "no message")
        await until(lambda: both.metric("pairs") == 0)


async def test_chunks_wait_on_the_stream_while_those_before_them_are_not_taken_off_the_lane() -> None:
    """However many transfers have a window each: their bytes come with them."""
    async with ends("grpc", window=2) as both, liar(both) as peer:
        goes_on = threading.Event()
        both.sink.before = lambda _: goes_on.wait(20) and None
        ids = [TID, new_id()]
        await peer.say(offer=kv.Offer(transfer_id=ids[1], token_end=TOKENS))
        assert (await peer.hear()).grant.transfer_id == ids[1]
        for tid in ids:
            for layer in range(2):
                wire = to_bytes(random_kv(LAYOUT, TOKENS)[layer : layer + 1])
                await peer.say(
                    chunk=a_chunk(
                        transfer_id=tid, seq=layer, layer_begin=layer, layer_end=layer + 1, num_bytes=wire.numel(),
                        checksum=checksum(wire), data=wire.numpy().tobytes(),
                    )
                )  # fmt: skip
        await peer.say(offer=kv.Offer(transfer_id=new_id(), token_end=TOKENS))
        await asyncio.sleep(0.1)
        assert both.servicer.open_transfers == 2, "what comes after the chunks has not been read"
        goes_on.set()
        await until(lambda: both.servicer.open_transfers == 3)


async def test_a_chunk_of_a_transfer_that_has_ended_is_not_one_of_the_next_by_that_name() -> None:
    async with ends("grpc", window=2) as both, liar(both) as peer:
        goes_on, other = threading.Event(), new_id()
        both.sink.before = lambda tid: (tid == other and goes_on.wait(20)) and None
        await peer.say(offer=kv.Offer(transfer_id=other, token_end=TOKENS))
        assert (await peer.hear()).grant.transfer_id == other
        await peer.say(chunk=a_chunk(transfer_id=other))
        late = to_bytes(random_kv(LAYOUT, TOKENS, seed=9))
        await peer.say(chunk=a_chunk(checksum=checksum(late), data=late.numpy().tobytes()))
        await peer.say(abort=kv.Abort(transfer_id=TID))
        await peer.say(offer=kv.Offer(transfer_id=TID, token_end=TOKENS))
        assert (await peer.hear()).grant.transfer_id == TID
        assert both.sink.failures.pop(TID)
        goes_on.set()
        assert (await peer.hear()).chunk_ack.transfer_id == other
        await until(lambda: both.servicer.staging_slots == 0)
        assert both.sink.pages[TID].isnan().all()
        await peer.say(chunk=a_chunk())
        assert (await peer.hear()).chunk_ack == kv.ChunkAck(transfer_id=TID)
        await peer.say(sealed=the_seal())
        assert (await peer.hear()).WhichOneof("message") == "sealed_ack"
        assert torch.equal(both.sink.pages[TID], random_kv(LAYOUT, TOKENS))
