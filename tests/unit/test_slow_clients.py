"""Clients that stop reading, over real sockets: they hold nothing for long. Who only reads slowly is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import fakes
import grpc
import orjson
import pytest
from fakes import FakeWorker
from pagewire.v1 import inference_pb2, inference_pb2_grpc
from pagewire_core import feed
from pagewire_core.tokenizer import Tokenizer
from pagewire_router import attempt
from router_scene import Scene, request, scene, until
from scripted_router import Bridge, Events, GenerateRequest, accepted, delta, eventually, running_bridge

TIMEOUT_S = 0.4


@pytest.fixture(autouse=True)
def _workers_of_many_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "MAX_NUM_SEQS", 128)


async def endless(_request: GenerateRequest) -> Events:
    """64 KiB of text again and again, until the call is cancelled."""
    yield accepted()
    while True:
        yield delta("x" * 65536)
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def reader(bridge: Bridge) -> AsyncIterator[socket.socket]:
    """A client of a stream, with a receive buffer that is soon full."""
    bridge.router.script = endless
    host, port = bridge.url.removeprefix("http://").split(":")
    client = socket.socket()
    with client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (host, int(port)))
        body = orjson.dumps({"prompt": "hi", "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        await loop.sock_sendall(client, head.encode() + body)
        assert (await loop.sock_recv(client, 2048)).startswith(b"HTTP/1.1 200")
        yield client


async def test_an_http_client_that_stops_reading_is_cut() -> None:
    async with running_bridge(send_timeout_s=TIMEOUT_S) as bridge, reader(bridge) as client:
        await eventually(lambda: bridge.router.num_cancelled == 1, within_s=10)
        text = (await bridge.http.get("/metrics")).text
        assert 'route="/v1/completions",status="499"} 1.0' in text
        with pytest.raises(ConnectionResetError):  # not a good end, and no descriptor that waits for ever
            while await asyncio.get_running_loop().sock_recv(client, 1 << 20):
                pass


async def test_an_http_client_that_reads_slowly_is_left_alone() -> None:
    async with running_bridge(send_timeout_s=TIMEOUT_S) as bridge, reader(bridge) as client:
        ends, got = time.monotonic() + 4 * TIMEOUT_S, 0
        while time.monotonic() < ends:
            got += len(await asyncio.get_running_loop().sock_recv(client, 1 << 20))
            await asyncio.sleep(0.05)
        assert got > 65536 and bridge.router.num_cancelled == 0
    assert bridge.router.num_cancelled == 1


@contextlib.asynccontextmanager
async def narrow(s: Scene) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    """A gRPC client that takes little unless it is read."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(s.address, options) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


LONG = {"n": 128, "sampling": {"max_tokens": 200, "ignore_eos": True}}


async def test_a_grpc_client_that_stops_reading_is_cancelled(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", "x" * 200, send_timeout=TIMEOUT_S) as s, narrow(s) as stub:
        call = stub.Generate(request(**LONG))
        await call.read()
        assert s.router.admission.num_running == 1
        await s.settle()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert "took nothing of its answer" in caught.value.details()


async def test_a_grpc_client_that_reads_slowly_is_left_alone(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", "x" * 200, send_timeout=TIMEOUT_S) as s, narrow(s) as stub:
        kinds = []
        async for response in stub.Generate(request(**LONG | {"n": 16})):
            kinds.append(response.WhichOneof("event"))
            if len(kinds) % 800 == 0:
                await asyncio.sleep(TIMEOUT_S / 2)
        assert kinds[0] == "accepted" and kinds[-1] == "summary" and len(kinds) > 16 * 190


async def test_a_feed_that_nobody_reads_ends_its_calls(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", "x" * 200, send_timeout=TIMEOUT_S) as s, narrow(s) as stub:
        deltas = stub.DeltaFeed(inference_pb2.DeltaFeedRequest(feed_id=b"f" * 16))
        await deltas.read()
        s.workers["d1"].script.step_s = 4 * TIMEOUT_S / 200  # nothing that comes later would notice
        s.workers["d1"].script.hooks["finished"] = lambda worker: asyncio.sleep(30)
        call = stub.Generate(request(feed_id=b"f" * 16, feed_call=1, **LONG))
        responses = [response async for response in call]
        assert responses[-1].error.message == "the caller's feed has ended"
        deltas.cancel()
        await s.settle()


async def test_an_answer_that_piles_up_is_given_up(byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "MAX_UNREAD", 50)
    monkeypatch.setattr(FakeWorker, "feed", "in order")
    async with scene(byte_tokenizer, "p1 d1", "x" * 200) as s, narrow(s) as stub:
        s.workers["d1"].script.step_s = 0.001
        call = stub.Generate(request(**LONG))
        await call.read()
        await until(lambda: not any(w.open_calls for w in s.workers.values()), seconds=20)
        assert s.router.admission.num_running == 1, "the client is not yet told, and nobody works for it any more"
        while (last := await call.read()) is not grpc.aio.EOF:
            response = last
        assert "more slowly than it is made" in response.error.message


async def test_a_feed_that_piles_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_MAX_UNREAD", 50)
    full: feed.Feed[inference_pb2.DeltaFeedResponse] = feed.Feed(inference_pb2.DeltaFeedResponse)
    batches = full.batches()
    await anext(batches)
    for call in range(50):
        full.entry(call)
    assert len((await anext(batches)).entries) == 50
    for call in range(50):
        full.entry(call)
    with pytest.raises(Exception, match="feed has ended"):
        full.entry(50)
