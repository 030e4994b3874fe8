"""Workers in this process: real engines, real servicers, real sockets between them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engines import ROOT, assert_empty, make_engine
from kv_endpoints import until
from pagewire.v1 import common_pb2 as pb
from pagewire.v1 import decode_pb2, prefill_pb2
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import add_KvChannelServiceServicer_to_server
from pagewire_core.rpc import RpcServer
from pagewire_core.tasks import all_of
from pagewire_decode.servicer import DecodeServicer
from pagewire_decode.transfers import Transfers
from pagewire_engine.engine import Engine, Outbox, deliver_outbox
from pagewire_engine.metrics import StageMetrics
from pagewire_prefill.servicer import PrefillServicer
from pagewire_prefill.source import PromptSource
from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.metrics import TransferMetrics
from pagewire_transfer.receiver import KvChannelServicer
from pagewire_transfer.sender import KvSender
from pagewire_worker.prefixes import PrefixFetcher, PrefixLender
from prometheus_client import CollectorRegistry

SERVICE = kv.DESCRIPTOR.services_by_name["KvChannelService"]


@dataclass
class Peer:
    """One worker of both roles."""

    name: str
    address: str
    engine: Engine
    transfers: Transfers
    sender: KvSender
    receiver: KvChannelServicer
    server: RpcServer
    lender: PrefixLender
    prefill: PrefillServicer
    decode: DecodeServicer
    registry: CollectorRegistry

    def holds(self, tokens: int, timeout_s: float = 5.0) -> pb.KvHolder:
        """How a router names this worker as the holder of a prefix."""
        return pb.KvHolder(
            worker_id=self.name,
            address=self.address,
            instance=f"{self.name}-life-1",
            tokens=tokens,
            timeout_s=timeout_s,
        )

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"pagewire_kv_{name}", labels) or 0.0

    async def assert_empty(self) -> None:
        await until(lambda: not self.engine.blocks.num_held and not self.prefill.num_calls, 10)
        assert_empty(self.engine)
        assert not len(self.transfers) and not self.sender.open_transfers and not self.receiver.open_transfers
        assert not self.sender.staging_slots and not self.receiver.staging_slots


@contextlib.asynccontextmanager
async def peer(
    path: Path, name: str, *, lane: str = "grpc", chunk_bytes: int = 4 << 20, **options: Any
) -> AsyncIterator[Peer]:
    loop = asyncio.get_running_loop()
    engine = make_engine(path, **options)

    def deliver(outbox: Outbox) -> None:
        if outbox:
            loop.call_soon_threadsafe(deliver_outbox, outbox)

    engine._deliver = deliver
    engine.layers.enabled = True
    loop.add_reader(engine.runner.progress, engine.tell_layers)
    registry = CollectorRegistry()
    metrics, stages = TransferMetrics(registry), StageMetrics(registry)
    identity = WorkerIdentity(name, f"{name}-life-1", b"f" * 32, engine.runner.cache.layout, "127.0.0.1")
    common: dict[str, Any] = {"lanes": [lane], "metrics": metrics, "timeout_s": 5.0}
    transfers, source = Transfers(engine), PromptSource(engine)
    lender = PrefixLender(engine, source)
    sender = KvSender(identity, lender, chunk_bytes=chunk_bytes, **common)
    receiver = KvChannelServicer(identity, transfers, **common)
    transfers.abort_peer = receiver.abort
    receiver.lend = partial(lender.lend, sender)
    server = RpcServer()
    server.add(add_KvChannelServiceServicer_to_server, receiver, SERVICE)
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    thread = threading.Thread(target=engine.run_forever)
    thread.start()
    fetch = PrefixFetcher(engine, transfers, identity, address, None, registry)
    prefill = PrefillServicer(engine, source, sender, stages, fetch=fetch)
    decode = DecodeServicer(engine, transfers, stages, identity.instance, address, fetch=fetch)
    try:
        yield Peer(name, address, engine, transfers, sender, receiver, server, lender, prefill, decode, registry)
    finally:
        await sender.close()
        await server.stop(0)
        await receiver.close()
        engine.stop()
        await asyncio.to_thread(thread.join)
        loop.remove_reader(engine.runner.progress)


@dataclass
class Alone:
    tokens: list[int]
    started: decode_pb2.DecodeStarted


@dataclass
class Answer:
    tokens: list[int]
    started: prefill_pb2.PrefillStarted
    sent: prefill_pb2.KvSent


async def compute(
    prompt: Sequence[int], worker: Peer, holder: pb.KvHolder | None = None, max_tokens: int = 12
) -> Alone:
    """Computes a prompt and decodes it on one worker."""
    request = decode_pb2.DecodeRequest(
        transfer_id=os.urandom(16), prompt_ids=prompt, cache_root=ROOT, request_id="test", local_prefill=True,
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=1), holder=holder,
    )  # fmt: skip
    return await _decode(worker, request)


async def hand_over(
    prompt: Sequence[int], source: Peer, target: Peer, max_tokens: int = 12, holder: pb.KvHolder | None = None
) -> Answer:
    """Computes a prompt on one worker and decodes it, greedily, on another."""
    ids: dict[str, Any] = {"transfer_id": os.urandom(16), "prompt_ids": prompt, "cache_root": ROOT}
    sampling = pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=1)
    reserved = await target.decode.Reserve(decode_pb2.ReserveRequest(**ids), None)  # type: ignore[arg-type]
    request = prefill_pb2.PrefillRequest(
        **ids, request_id="test", sampling=sampling, decode_address=reserved.kv_address,
        decode_instance=reserved.instance, decode_local_tokens=reserved.local_tokens, holder=holder,
    )  # fmt: skip
    events: list[prefill_pb2.PrefillResponse] = []

    async def prefill() -> None:
        events.extend([event async for event in source.prefill.Prefill(request, None)])  # type: ignore[arg-type]

    decoding = _decode(target, decode_pb2.DecodeRequest(**ids, request_id="test", sampling=sampling))
    decoded, _ = await all_of([decoding, prefill()])
    assert decoded
    sent = events[-1].kv_sent
    assert 0 < sent.timings.prefill_us < 60e6 and 0 < sent.timings.kv_tail_us < 60e6 and sent.wire_us < 60e6
    return Answer(decoded.tokens, events[0].started, sent)


async def _decode(target: Peer, request: decode_pb2.DecodeRequest) -> Alone:
    tokens: list[int] = []
    started = decode_pb2.DecodeStarted()
    async for event in target.decode.Decode(request, None):  # type: ignore[arg-type]
        if event.HasField("started"):
            started = event.started
        timings = event.finished.timings
        assert max(timings.queue_us, timings.prefill_us, timings.decode_us) < 60e6, "nothing here takes a minute"
        tokens += [token.token_id for token in event.started.first_tokens]
        tokens += [token.token_id for choice in event.tokens.choices for token in choice.tokens]
    return Alone(tokens, started)
