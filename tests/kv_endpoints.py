"""Two ends of a KV channel in this process, over real sockets, with plain tensors where engines would be."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from pagewire.v1 import common_pb2 as pb
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import add_KvChannelServiceServicer_to_server
from pagewire_core.errors import Cancelled, PagewireError
from pagewire_core.rpc import RpcServer
from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.metrics import TransferMetrics
from pagewire_transfer.receiver import KvChannelServicer, ReceiveStats
from pagewire_transfer.sender import KvSender, Outgoing
from pagewire_transfer.wire import DTYPES, checksum
from prometheus_client import CollectorRegistry

SERVICE = kv.DESCRIPTOR.services_by_name["KvChannelService"]
LAYOUT = kv.KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32")
FIRST = [pb.SampledToken(token_id=7, logprob=-0.5)]
_ids = itertools.count(1)


def new_id() -> bytes:
    return next(_ids).to_bytes(16, "big")


def identity(
    worker_id: str, layout: kv.KvLayout = LAYOUT, fingerprint: bytes = b"f" * 32, gpu: str = ""
) -> WorkerIdentity:
    return WorkerIdentity(worker_id, f"{worker_id}-life-1", fingerprint, layout, "127.0.0.1", gpu)


def random_kv(layout: kv.KvLayout, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    return torch.randn(shape, generator=generator).to(DTYPES[layout.dtype])


@dataclass
class Source:
    """Prompts' KV by transfer id, all from token 0; `before` runs on the lane thread ahead of every gather."""

    prompts: dict[bytes, torch.Tensor] = field(default_factory=dict)
    before: Callable[[bytes], None] = lambda _: None
    gathering: set[bytes] = field(default_factory=set)
    gathers: int = 0

    def gather(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        self.gathering.add(transfer_id)
        self.gathers += 1
        try:
            self.before(transfer_id)
            prompt = self.prompts.get(transfer_id)
            if prompt is None:
                raise Cancelled("the blocks were released")
            wire.copy_(prompt[slice(*layers), :, slice(*tokens)])
            return checksum(wire)
        finally:
            self.gathering.discard(transfer_id)


@dataclass
class Sink:
    """Collects what arrives in tensors that start as NaN, so that what never came is seen."""

    layout: kv.KvLayout
    pages: dict[bytes, torch.Tensor] = field(default_factory=dict)
    begins: dict[bytes, int] = field(default_factory=dict)
    done: dict[bytes, ReceiveStats] = field(default_factory=dict)
    first_tokens: dict[bytes, list[pb.SampledToken]] = field(default_factory=dict)
    failures: dict[bytes, PagewireError] = field(default_factory=dict)
    refuse: Exception | None = None
    refuse_seal: Exception | None = None
    hold_bind: asyncio.Event | None = None
    before: Callable[[bytes], None] = lambda _: None

    async def bind(self, transfer_id: bytes, token_begin: int, token_end: int) -> None:
        if self.hold_bind is not None:
            await self.hold_bind.wait()
        if self.refuse is not None:
            raise self.refuse
        layout = self.layout
        shape = (layout.num_layers, 2, token_end - token_begin, layout.num_kv_heads, layout.head_dim)
        self.pages[transfer_id] = torch.full(shape, torch.nan, dtype=DTYPES[layout.dtype])
        self.begins[transfer_id] = token_begin

    def scatter(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        self.before(transfer_id)
        pages = self.pages.get(transfer_id)
        if pages is None:
            raise Cancelled("the transfer was stopped")
        begin = self.begins[transfer_id]
        pages[slice(*layers), :, tokens[0] - begin : tokens[1] - begin] = wire
        return checksum(wire)

    async def sealed(self, transfer_id: bytes, received: ReceiveStats, first_tokens: Sequence[pb.SampledToken]) -> None:
        assert transfer_id not in self.done and transfer_id not in self.failures
        if self.refuse_seal is not None:
            raise self.refuse_seal
        self.done[transfer_id] = received
        self.first_tokens[transfer_id] = list(first_tokens)

    def failed(self, transfer_id: bytes, error: PagewireError) -> None:
        assert transfer_id not in self.done
        self.failures[transfer_id] = error
        self.pages.pop(transfer_id, None)


@dataclass
class Ends:
    """A sender and a receiver that know each other."""

    source: Source
    sender: KvSender
    sink: Sink
    servicer: KvChannelServicer
    server: RpcServer
    address: str
    instance: str
    registry: CollectorRegistry

    async def open(self, prompt: torch.Tensor, begin: int = 0) -> Outgoing:
        """Offers the prompt's tokens from `begin` on."""
        transfer_id = new_id()
        self.source.prompts[transfer_id] = prompt
        return await self.sender.open(transfer_id, self.address, self.instance, (begin, prompt.shape[2]))

    @contextlib.asynccontextmanager
    async def listening_again(self) -> AsyncIterator[None]:
        """The same receiver, after its server has stopped."""
        server = RpcServer()
        server.add(add_KvChannelServiceServicer_to_server, self.servicer, SERVICE)
        await server.start("127.0.0.1", int(self.address.rpartition(":")[2]))
        try:
            yield
        finally:
            await self.sender.close()
            await server.stop(0)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"pagewire_kv_{name}", labels) or 0.0

    async def assert_empty(self) -> None:
        """Everything was given back, or is within a moment."""
        await until(lambda: self.held() == (0, 0, 0, 0))
        assert self.metric("staging_slots") == 0

    def held(self) -> tuple[int, int, int, int]:
        sender, servicer = self.sender, self.servicer
        return sender.staging_slots, sender.open_transfers, servicer.staging_slots, servicer.open_transfers


@contextlib.asynccontextmanager
async def ends(
    lane: str = "grpc",
    layout: kv.KvLayout = LAYOUT,
    *,
    timeout_s: float = 5.0,
    chunk_bytes: int = 4096,
    window: int = 8,
    prefill: WorkerIdentity | None = None,
    gpu: str = "",
    port: int = 0,
) -> AsyncIterator[Ends]:
    """lane: or several, best first. gpu: the one that both are on."""
    registry = CollectorRegistry()
    source, sink, decode = Source(), Sink(layout), identity("decode", layout, gpu=gpu)
    common: dict[str, Any] = {"lanes": lane.split(","), "metrics": TransferMetrics(registry), "timeout_s": timeout_s}
    servicer = KvChannelServicer(decode, sink, window=window, **common)
    server = RpcServer()
    server.add(add_KvChannelServiceServicer_to_server, servicer, SERVICE)
    bound = await server.start("127.0.0.1", port)
    sender = KvSender(prefill or identity("prefill", layout, gpu=gpu), source, chunk_bytes=chunk_bytes, **common)
    try:
        yield Ends(source, sender, sink, servicer, server, f"127.0.0.1:{bound}", decode.instance, registry)
    finally:
        await sender.close()
        await server.stop(0)
        await servicer.close()


async def until(condition: Callable[[], bool], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.005)


def held_by_process() -> tuple[int, int]:
    """File descriptors and native threads."""
    process = psutil.Process()
    return process.num_fds(), process.num_threads()


def lane_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-lane")]
