"""A prefill worker that says what it is told to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from kv_endpoints import FIRST, LAYOUT, Ends, identity, random_kv
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import KvChannelServiceStub
from pagewire_core.errors import PagewireError, from_proto, from_rpc
from pagewire_core.rpc import open_channel
from pagewire_transfer.wire import checksum, root_checksum, to_bytes

TID = b"t" * 16
TOKENS = 4


class Liar:
    """A prefill worker that says what it is told to, on the lane "grpc"."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call

    async def greet(self, instance: str) -> None:
        await self.say(hello=identity("liar").hello(instance, ["grpc"]))
        assert (await self.hear()).welcome.lane == "grpc"

    async def say(self, **message: object) -> None:
        await self._call.write(kv.ConnectRequest(**message))

    async def say_again(self, **message: object) -> None:
        """And again, for ever."""
        while True:
            await self.say(**message)

    async def hear(self) -> kv.ConnectResponse:
        response = await self._call.read()
        if response is grpc.aio.EOF:
            raise AssertionError("the stream ended well")
        return response

    async def ends_with(self, error: type[PagewireError], sentence: str) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await self.hear()
        found = from_rpc(ended.value)
        assert isinstance(found, error) and sentence in found.message, found

    async def hears_abort(self, error: type[PagewireError], sentence: str) -> None:
        response = await self.hear()
        assert response.abort.transfer_id == TID, response
        found = from_proto(response.abort.error)
        assert isinstance(found, error) and sentence in found.message, found


@contextlib.asynccontextmanager
async def liar(both: Ends, *, hello: bool = True, granted: bool = True) -> AsyncIterator[Liar]:
    async with open_channel(both.address) as channel:
        peer = Liar(KvChannelServiceStub(channel).Connect())
        if hello:
            await peer.greet(both.instance)
        if hello and granted:
            await peer.say(offer=kv.Offer(transfer_id=TID, token_end=TOKENS))
            assert (await peer.hear()).grant.window == 2
        yield peer


def a_chunk(**changes: object) -> kv.Chunk:
    """All of the offer in one honest chunk, but for the changes."""
    wire = to_bytes(random_kv(LAYOUT, TOKENS))
    honest = kv.Chunk(
        transfer_id=TID, layer_end=LAYOUT.num_layers, token_end=TOKENS, num_bytes=wire.numel(), checksum=checksum(wire)
    )
    honest.data = wire.numpy().tobytes()
    for name, value in changes.items():
        setattr(honest, name, value)
    return honest


def the_seal(**changes: object) -> kv.Sealed:
    honest = kv.Sealed(transfer_id=TID, num_chunks=1, root_checksum=root_checksum([a_chunk().checksum]))
    honest.first_tokens.extend(FIRST)
    for name, value in changes.items():
        setattr(honest, name, value)
    return honest
