"""A prefill worker believes nothing that a decode worker says: every broken rule ends the pair and its transfers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import pytest
from kv_endpoints import FIRST, LAYOUT, ends, lane_threads, new_id, random_kv, until
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Incompatible, PagewireError, Unavailable

pytestmark = pytest.mark.usefixtures("frozen_heap")

INSTANCE = "decode-life-1"
Script = Callable[[kv.ConnectRequest], Sequence[bytes] | None]  # None: ends the stream, without an error


def said(**message: object) -> bytes:
    return kv.ConnectResponse(**message).SerializeToString()


def welcome(**changes: object) -> bytes:
    honest: dict[str, object] = {"instance": INSTANCE, "lane": "grpc", "epoch": 1}
    return said(welcome=kv.Welcome(**honest | changes))  # type: ignore[arg-type]


def after(kind: str, *answers: Callable[[bytes], bytes]) -> Script:
    """Honest until the first message of this kind, which is answered with these, each made for its transfer."""

    def script(request: kv.ConnectRequest) -> Sequence[bytes]:
        heard = request.WhichOneof("message")
        tid = getattr(request, heard or kind).transfer_id if heard in ("offer", "chunk", "sealed") else b""
        honest = {"hello": [welcome()], "offer": [granted(tid)]}.get(heard or "", [])
        return honest + [answer(tid) for answer in answers] if heard == kind else honest

    return script


def granted(tid: bytes) -> bytes:
    return said(grant=kv.Grant(transfer_id=tid, window=1))


def acknowledged(seq: int, resend: bool = False) -> Callable[[bytes], bytes]:
    return lambda tid: said(chunk_ack=kv.ChunkAck(transfer_id=tid, seq=seq, resend=resend))


def keys(_: bytes) -> bytes:
    return said(store_put=kv.StorePut(key="k", value=b"v" * 5000))


async def end_of_transfer(script: Script) -> PagewireError:
    """What ends a prompt's transfer to a decode worker that speaks by this script; nothing of it must be left."""

    left = asyncio.Event()

    async def connect(requests: AsyncIterator[kv.ConnectRequest], context: object) -> AsyncIterator[bytes]:
        try:
            async for request in requests:
                answers = script(request)
                if answers is None:
                    return
                for answer in answers:
                    yield answer
        finally:
            left.set()

    method = grpc.stream_stream_rpc_method_handler(connect, kv.ConnectRequest.FromString)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([
        grpc.method_handlers_generic_handler("pagewire.v1.KvChannelService", {"Connect": method})
    ])  # fmt: skip
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with ends("grpc", timeout_s=5) as both:
            both.source.prompts[tid := new_id()] = random_kv(LAYOUT, 30)
            async with asyncio.timeout(4):
                with pytest.raises(PagewireError) as ended:
                    outgoing = await both.sender.open(tid, f"127.0.0.1:{port}", INSTANCE, (0, 30))
                    await outgoing.seal(FIRST)
            await both.assert_empty()
            await until(lambda: both.metric("pairs") == 0 and not lane_threads() and left.is_set())
            return ended.value
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (lambda _: [welcome(lane="shm")], "no lane of ours: 'shm'"),
        (lambda _: [welcome(instance="decode-life-2")], "is decode-life-2, not decode-life-1"),
        (lambda _: [granted(b"")], "no lane of ours: ''"),
        (lambda _: [b"\xff\xff\xff"], "sent bytes that are no message"),
        (after("hello", lambda _: b"\xff\xff\xff"), "sent bytes that are no message"),
        (after("hello", lambda _: welcome()), "sent welcome out of turn"),
        (after("hello", lambda _: b""), "sent an empty message out of turn"),
        (after("hello", keys), "more into the store"),
        (after("offer", acknowledged(7)), "acknowledged chunk 7, which is not on its way"),
        (after("chunk", acknowledged(0, True), acknowledged(0)), "acknowledged chunk 0, which is not on its way"),
        (after("chunk", lambda tid: said(sealed_ack=kv.SealedAck(transfer_id=tid))), "a seal that was not sent"),
    ],
)
async def test_a_decode_worker_that_breaks_the_rules_is_left(script: Script, sentence: str) -> None:
    error = await end_of_transfer(script)
    assert isinstance(error, Incompatible) and sentence in error.message, error


def leave(_: bytes) -> bytes:
    raise RuntimeError


@pytest.mark.parametrize(
    "script",
    [
        lambda _: None,
        lambda request: None if request.HasField("offer") else [welcome()],
        after("hello", leave),
        after("chunk", leave),
    ],
)
async def test_an_end_without_a_word_is_a_lost_peer(script: Script) -> None:
    assert isinstance(await end_of_transfer(script), Unavailable)


async def test_who_waits_for_a_peer_that_says_nothing_hears_that_the_sender_closes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with ends("grpc", timeout_s=20) as both:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            opening = asyncio.create_task(both.sender.open(new_id(), address, both.instance, (0, 4)))
            await until(lambda: both.metric("pairs") == 1)
            await asyncio.wait_for(both.sender.close(), 5)
            with pytest.raises(Unavailable, match="shutting down"):
                await opening
