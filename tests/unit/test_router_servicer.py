"""What a router asks all its workers for at once."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fakes import FakeWorker
from pagewire.v1 import inference_pb2, worker_pb2
from pagewire_core.errors import Unavailable, from_rpc
from pagewire_core.tokenizer import Tokenizer
from router_scene import give_prefix, scene


async def test_a_cache_is_reset_on_every_worker_or_the_client_is_told(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reset(self: FakeWorker, request: Any, context: Any) -> worker_pb2.ResetPrefixCacheResponse:
        if self.draining:
            raise Unavailable("this worker is about to leave")
        return worker_pb2.ResetPrefixCacheResponse(num_blocks=3 if self.worker_id == "p1" else 4)

    monkeypatch.setattr(FakeWorker, "ResetPrefixCache", reset, raising=False)
    async with scene(byte_tokenizer, "p1 d1") as s:
        request = worker_pb2.ResetPrefixCacheRequest()
        assert (await s.stub.ResetPrefixCache(request)).num_blocks == 7
        s.workers["d1"].draining = True
        with pytest.raises(grpc.RpcError) as caught:
            await s.stub.ResetPrefixCache(request)
        assert "about to leave" in from_rpc(caught.value).message
        assert not any(worker.is_booked for worker in s.router.services.workers.live)


async def test_metrics_do_not_wait_for_a_worker_that_stands_still(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagewire_router.servicer._METRICS_TIMEOUT_S", 0.2)
    told = FakeWorker.Metrics

    async def but_d1(self: FakeWorker, request: Any, context: Any) -> worker_pb2.WorkerServiceMetricsResponse:
        if self.worker_id == "d1":
            await asyncio.sleep(60)
        return await told(self, request, context)

    monkeypatch.setattr(FakeWorker, "Metrics", but_d1)
    async with scene(byte_tokenizer, "p1 d1") as s:
        text = (await s.stub.Metrics(inference_pb2.MetricsRequest())).text
        assert 'pagewire_fake{instance="p1"}' in text and 'instance="d1"' not in text
        assert "pagewire_running_requests" in text, "its own are there all the same"


async def test_metrics_say_what_the_router_knows_when_it_is_asked(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        await give_prefix(s, "d1")
        breakers = s.router.services.placement.breakers
        breakers.failed("transfer", "unavailable", "p1", "d1")
        breakers.failed("decode", "unavailable", "d1")  # too seldom to open it
        told = (await s.stub.Metrics(inference_pb2.MetricsRequest())).text
        values = dict(line.rsplit(" ", 1) for line in told.splitlines() if line[0] != "#")
        open_circuits = {name: float(value) for name, value in values.items() if "circuits_open{" in name}
        assert {name.split('leg="')[1].split('"')[0]: value for name, value in open_circuits.items()} == {
            "prefill": 0, "transfer": 1, "decode": 0,
        }  # fmt: skip
        [blocks] = [float(value) for name, value in values.items() if name.startswith("pagewire_index_blocks")]
        assert blocks == s.router.index.num_blocks > 0


async def test_flags_are_told_of_the_router_and_by_worker(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        told = await s.stub.ServerInfo(inference_pb2.ServerInfoRequest())
        assert dict(told.flags) == dict(s.router.flags) and told.flags
        assert {worker.worker_id for worker in told.workers} == {"p1", "d1"}
