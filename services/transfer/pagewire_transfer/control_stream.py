"""The prefill side's end of a control stream: messages in order, and one error for whatever ends it."""

from __future__ import annotations

import asyncio

import grpc
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import KvChannelServiceStub
from pagewire_core.errors import (
    ERROR_METADATA_KEY,
    DeadlineExceeded,
    Incompatible,
    PagewireError,
    Unavailable,
    from_rpc,
)
from pagewire_core.rpc import open_channel
from pagewire_core.tls import WORKER, TlsFiles


class ControlStream:
    """A Connect call. Every method raises the PagewireError that says why the stream is over.

    was_cut: it ended without a word from the peer, which is dead or frozen, or the network to it is cut.
    """

    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        self._address = address
        self._channel = open_channel(address, tls, WORKER)
        self._call: grpc.aio.StreamStreamCall = KvChannelServiceStub(self._channel).Connect()
        self.was_cut = False

    async def shake_hands(self, hello: kv.Hello) -> kv.Welcome:
        """Raises Incompatible where the peer is another one than expected, or has no lane of ours."""
        await self.write(kv.ConnectRequest(hello=hello))
        response = await self.read()
        welcome = response.welcome
        if response.WhichOneof("message") != "welcome" or not any(
            lane.partition(":")[0] == welcome.lane for lane in hello.lanes
        ):
            raise Incompatible(f"decode worker {self._address} answered Hello with no lane of ours: {welcome.lane!r}")
        if welcome.instance != hello.expect_instance:
            raise Incompatible(f"decode worker {self._address} is {welcome.instance}, not {hello.expect_instance}")
        return welcome

    async def read(self) -> kv.ConnectResponse:
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError:
            raise await self._why_lost() from None
        if response is grpc.aio.EOF:
            raise await self._why_lost()
        if response is None:  # what gRPC gives for bytes that it cannot read
            raise Incompatible(f"decode worker {self._address} sent bytes that are no message")
        return response

    async def write(self, request: kv.ConnectRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self._why_lost() from None

    async def _why_lost(self) -> PagewireError:
        """The error behind the end of the stream, which has ended."""
        trailing = await self._call.trailing_metadata() or ()
        self.was_cut = all(key != ERROR_METADATA_KEY for key, _ in trailing)
        details = await self._call.details() or "closed"
        status = grpc.aio.AioRpcError(await self._call.code(), grpc.aio.Metadata(), trailing, details)
        error = from_rpc(status)
        if isinstance(error, Incompatible | DeadlineExceeded):
            return error
        return Unavailable(f"decode worker {self._address} was lost: {error.message}")

    def cancel(self) -> None:
        """Ends the call, and whoever waits for it."""
        self._call.cancel()

    async def close(self) -> None:
        await self._channel.close()
