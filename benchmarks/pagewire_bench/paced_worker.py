"""A prefill and a decode worker without a model that give tokens at a fixed pace: what is behind router and bridge.

    python -m pagewire_bench.paced_worker --redis-url URL --model DIRECTORY --ttft-ms 50 --itl-ms 100

They speak the real contract, but no KV moves: a decode worker has "received" it with the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop
from pagewire.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from pagewire_core.feed import Feeds
from pagewire_core.model_dir import resolve_model
from pagewire_core.registry import Registration
from pagewire_core.rpc import PROTOCOL, RpcServer
from pagewire_core.tokenizer import Tokenizer

from pagewire_bench.paced import Pace, Ticker

_TEXT = "A fox went to the river and saw a boat with a lamp. "
_BLOCKS = 1 << 20


class PacedWorker(
    prefill_pb2_grpc.PrefillServiceServicer,
    decode_pb2_grpc.DecodeServiceServicer,
    worker_pb2_grpc.WorkerServiceServicer,
):
    """One worker of a role. arrived: by transfer, set when a prompt's KV would be there; shared by both workers."""

    def __init__(self, info: worker_pb2.InfoResponse, pace: Pace, ids: list[int], arrived: dict[bytes, asyncio.Event]):
        self._info, self._pace, self._ids, self._arrived = info, pace, ids, arrived
        self._ticker = Ticker(pace.itl_s)
        self._feeds = Feeds(decode_pb2.FeedResponse)

    async def serve(self) -> str:
        """Returns its address."""
        self._server = RpcServer()
        for adder, module, name in (
            (prefill_pb2_grpc.add_PrefillServiceServicer_to_server, prefill_pb2, "PrefillService"),
            (decode_pb2_grpc.add_DecodeServiceServicer_to_server, decode_pb2, "DecodeService"),
            (worker_pb2_grpc.add_WorkerServiceServicer_to_server, worker_pb2, "WorkerService"),
        ):
            self._server.add(adder, self, module.DESCRIPTOR.services_by_name[name])
        self._info.address = f"127.0.0.1:{await self._server.start('127.0.0.1', 0)}"
        await self._server.set_serving(True)
        return self._info.address

    async def Info(self, request: Any, context: grpc.aio.ServicerContext) -> worker_pb2.InfoResponse:
        return self._info

    async def Stats(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[worker_pb2.StatsResponse]:
        while True:
            yield worker_pb2.StatsResponse(free_blocks=_BLOCKS, total_blocks=_BLOCKS, max_num_seqs=1024)
            await asyncio.sleep(0.2)

    async def Snapshot(
        self, request: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.SnapshotResponse]:
        yield worker_pb2.SnapshotResponse(sequence=0)

    async def Reserve(self, request: Any, context: grpc.aio.ServicerContext) -> decode_pb2.ReserveResponse:
        return decode_pb2.ReserveResponse(instance=self._info.instance, kv_address=self._info.address)

    def _kv(self, transfer_id: bytes) -> asyncio.Event:
        return self._arrived.setdefault(transfer_id, asyncio.Event())

    def _token(self, position: int) -> common_pb2.SampledToken:
        return common_pb2.SampledToken(token_id=self._ids[position % len(self._ids)])

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        yield prefill_pb2.PrefillResponse(started=prefill_pb2.PrefillStarted())
        await asyncio.sleep(self._pace.ttft_s)
        yield prefill_pb2.PrefillResponse(first_tokens=prefill_pb2.FirstTokens(tokens=[self._token(0)] * request.n))
        self._kv(request.transfer_id).set()
        sent = prefill_pb2.KvSent(transferred_tokens=len(request.prompt_ids), transferred_bytes=1, lane="none")
        yield prefill_pb2.PrefillResponse(kv_sent=sent)

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        num_prompt = len(request.prompt_ids)
        started = decode_pb2.DecodeStarted(first_tokens=[self._token(0)] * request.n, lane="none")
        if request.local_prefill:
            await asyncio.sleep(self._pace.ttft_s)
            started.computed_tokens = num_prompt
        else:
            try:
                await self._kv(request.transfer_id).wait()
            finally:
                self._arrived.pop(request.transfer_id, None)
            started.received_tokens = num_prompt
        yield decode_pb2.DecodeResponse(started=started)
        feed, num_entries, end = self._feeds.get(request.feed_id), 0, request.sampling.max_tokens
        for position in range(1, max(end, 2)):
            if position < end:
                await self._ticker.tick()
            last = position >= end - 1
            reason = common_pb2.FINISH_REASON_LENGTH if last else common_pb2.FINISH_REASON_UNSPECIFIED
            tokens = [self._token(position)] if position < end else []  # the only token is the prefill worker's
            step = decode_pb2.DecodeTokens()
            for choice in range(request.n):
                step.choices.add(choice=choice, tokens=tokens, finish_reason=reason)
            if feed:
                entry, new = feed.entry(request.feed_call)
                entry.choices.extend(step.choices)
                num_entries += new
            else:
                yield decode_pb2.DecodeResponse(tokens=step)
        yield decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished(feed_entries=num_entries))

    async def Stop(self, request: decode_pb2.StopRequest, context: grpc.aio.ServicerContext) -> decode_pb2.StopResponse:
        return decode_pb2.StopResponse()  # the call itself is cancelled as well, and nothing else is held

    async def Feed(
        self, request: decode_pb2.FeedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.FeedResponse]:
        async with contextlib.aclosing(self._feeds.serve(request.feed_id)) as batches:
            async for batch in batches:
                yield batch


async def main(redis_url: str, directory: Path, pace: Pace) -> None:
    ids = Tokenizer(directory).encode(_TEXT, add_special_tokens=False)
    arrived: dict[bytes, asyncio.Event] = {}
    digest = resolve_model(str(directory)).digest()
    async with asyncio.TaskGroup() as group:
        for name, role in (("prefill", common_pb2.WORKER_ROLE_PREFILL), ("decode", common_pb2.WORKER_ROLE_DECODE)):
            info = worker_pb2.InfoResponse(
                worker_id=f"paced-{name}", instance=f"paced-{name}-1", role=role, fingerprint=b"f" * 32,
                model_digest=digest, protocol=PROTOCOL, max_model_len=4096, block_size=16,
                total_blocks=_BLOCKS, kv_bytes_per_token=1,
            )  # fmt: skip
            address = await PacedWorker(info, pace, ids, arrived).serve()
            entry = {"worker_id": info.worker_id, "instance": info.instance, "address": address, "role": name}
            group.create_task(Registration(redis_url, entry).run())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--model", type=Path, required=True)
    args, pace = Pace.parse(parser)
    uvloop.run(main(args.redis_url, args.model, pace))
