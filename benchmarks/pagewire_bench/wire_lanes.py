"""What each lane moves between two processes, bare and as whole hand-offs, beside a TCP socket and memcpy."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from pagewire.v1 import common_pb2
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import add_KvChannelServiceServicer_to_server
from pagewire_core.rpc import RpcServer
from pagewire_engine.cpu.kv_cache import PackedKVCache
from pagewire_engine.models.config import read_config
from pagewire_kernels.cpu import library as cpu_library
from pagewire_transfer.group_lanes import DECODE_RANK, PREFILL_RANK
from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.lanes import Lane, open_lane
from pagewire_transfer.metrics import TransferMetrics
from pagewire_transfer.receiver import KvChannelServicer, ReceiveStats
from pagewire_transfer.relay_store import RelayStore
from pagewire_transfer.sender import KvSender
from pagewire_transfer.wire import ChunkRange, chunk_bytes
from prometheus_client import CollectorRegistry

TIMEOUT_S = 30.0
TOTAL_BYTES = 256 << 20  # per measurement of a lane
CHUNKS = (1 << 20, 4 << 20, 8 << 20)
LAYOUT = kv.KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")  # 23 KB a token
PROMPTS = (512, 2048, 8192)
HAND_OFFS = 12  # of a prompt, one after the other, for one figure
CHECKED, UNCHECKED = b"checked", b"unchecked"  # what a transfer's name begins with: whether anybody sums up its bytes
_BLOCK = 16


def _identity(name: str) -> WorkerIdentity:
    return WorkerIdentity(name, f"{name}-1", b"f" * 32, LAYOUT, "127.0.0.1")


def _settings(lane: str) -> dict[str, Any]:
    return {"lanes": [lane], "metrics": TransferMetrics(CollectorRegistry()), "timeout_s": TIMEOUT_S}


class Pages:
    """Both ends' memory: the pages of a worker on a CPU, a prompt's scattered over them."""

    def __init__(self) -> None:
        shape = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256,
            "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": LAYOUT.num_layers, "num_attention_heads": 9, "head_dim": LAYOUT.head_dim,
            "num_key_value_heads": LAYOUT.num_kv_heads, "rms_norm_eps": 1e-5, "max_position_embeddings": max(PROMPTS),
        }  # fmt: skip
        config = read_config(shape, torch.bfloat16, torch.device("cpu"))
        num_blocks = max(PROMPTS) // _BLOCK
        self._cache = PackedKVCache(cpu_library.best(), config, num_blocks, _BLOCK, poison=True)
        self._table = random.Random(0).sample(range(num_blocks), num_blocks)

    def gather(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        if transfer_id.startswith(CHECKED):
            return self._cache.gather_checked(self._table, layers, tokens, wire)
        self._cache.gather(self._table, layers, tokens, wire)
        return 0

    async def bind(self, transfer_id: bytes, token_begin: int, token_end: int) -> None:
        pass

    def scatter(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        if transfer_id.startswith(CHECKED):
            return self._cache.scatter_checked(wire, self._table, layers, tokens)
        self._cache.scatter(wire, self._table, layers, tokens)
        return 0

    async def sealed(
        self, transfer_id: bytes, received: ReceiveStats, first_tokens: Sequence[common_pb2.SampledToken]
    ) -> None:
        assert received.bytes == chunk_bytes(LAYOUT, ChunkRange((0, LAYOUT.num_layers), (0, received.tokens)))

    def failed(self, transfer_id: bytes, error: Exception) -> None:
        raise error


class Peer:
    """The other process, as the first one sees it; `ask` makes it do what is measured."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._control, control = context.Pipe()
        self._relay, relay = context.Pipe()
        self._process = context.Process(target=_peer, args=(control, relay), daemon=True)
        self._process.start()
        self._epoch = 0

    def ask(self, *what: Any) -> None:
        self._control.send(what)

    def answer(self) -> Any:
        return self._control.recv()

    def open_lane(self, name: str) -> Lane:
        self._epoch += 1
        self.ask("lane", name, self._epoch)
        return _open(name, self._relay, PREFILL_RANK, self._epoch)

    def end(self) -> None:
        self.ask("end")
        self._process.join()


def _open(name: str, relay: Connection, rank: int, epoch: int) -> Lane:
    """One end of a lane, its store carried by a pipe."""
    store = RelayStore(lambda key, value: relay.send((key, value)), TIMEOUT_S)
    up = threading.Event()

    def receive() -> None:
        while not up.is_set():
            if relay.poll(0.01):
                store.receive(*relay.recv())

    reading = threading.Thread(target=receive)
    reading.start()
    try:
        return open_lane(name, store, rank, "127.0.0.1", epoch, TIMEOUT_S)
    finally:
        time.sleep(0.05)  # the peer may still be opening its end
        up.set()
        reading.join()


def _peer(control: Connection, relay: Connection) -> None:
    torch.set_num_threads(1)
    lane: Lane | None = None
    target = torch.zeros(max(CHUNKS), dtype=torch.uint8)
    while (what := control.recv())[0] != "end":
        match what:
            case ("lane", name, epoch):
                lane = _open(name, relay, DECODE_RANK, epoch)
            case ("receive", size, count, copies):
                assert lane is not None
                control.send("ready")
                for left in reversed(range(count)):
                    with lane.recv(size, b"", size if left else 0) as wire:
                        if copies:
                            target[:size].copy_(wire)
                control.send("done")
            case ("close",):
                assert lane is not None
                lane.close()
            case ("tcp", size, count):
                _receive_tcp(control, size, count)
            case ("serve", name):
                asyncio.run(_serve(control, name))


def _receive_tcp(control: Connection, size: int, count: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        control.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        buffer = memoryview(bytearray(size))
        with connection:
            for _ in range(count):
                received = 0
                while received < size:
                    received += connection.recv_into(buffer[received:])
            control.send("done")


async def _serve(control: Connection, lane: str) -> None:
    """The decode side of hand-offs, until told to end."""
    servicer = KvChannelServicer(_identity("decode"), Pages(), **_settings(lane))
    server = RpcServer()
    server.add(add_KvChannelServiceServicer_to_server, servicer, kv.DESCRIPTOR.services_by_name["KvChannelService"])
    control.send(await server.start("127.0.0.1", 0))
    await asyncio.to_thread(control.recv)
    await server.stop(0)
    await servicer.close()


def measure_lane(peer: Peer, name: str, size: int) -> float:
    """From memory of one process into memory of the other. Sockets copy by themselves, the measured one and those below
    the other lanes; writing into shared memory and reading it is all that this lane does. A lane whose chunks are
    smaller than `size` is given its largest, as a hand-off gives it.
    """
    copies, lane = name == "shm", peer.open_lane(name)
    size = min(size, lane.most_bytes)
    count = TOTAL_BYTES // size
    wire = torch.ones(size, dtype=torch.uint8)
    seconds = 0.0
    for repeats in (2, count):  # the first few touch the memory
        peer.ask("receive", size, repeats, copies)
        assert peer.answer() == "ready"
        begin = time.perf_counter()
        for _ in range(repeats):
            staging = lane.staging(size)
            if copies:
                staging.copy_(wire)
            lane.send(staging)
        assert peer.answer() == "done"
        seconds = time.perf_counter() - begin
    peer.ask("close")
    lane.close()
    return count * size / seconds


def measure_tcp(peer: Peer, size: int) -> float:
    count = TOTAL_BYTES // size
    peer.ask("tcp", size, count)
    with socket.create_connection(("127.0.0.1", peer.answer())) as connection:
        wire = memoryview(bytes(size))
        begin = time.perf_counter()
        for _ in range(count):
            connection.sendall(wire)
        assert peer.answer() == "done"
        return count * size / (time.perf_counter() - begin)


def measure_memcpy(size: int) -> float:
    source, target = torch.ones(TOTAL_BYTES, dtype=torch.uint8), torch.zeros(TOTAL_BYTES, dtype=torch.uint8)
    begin = time.perf_counter()
    for start in range(0, TOTAL_BYTES, size):
        target[start : start + size].copy_(source[start : start + size])
    return TOTAL_BYTES / (time.perf_counter() - begin)


def measure_hand_offs(peer: Peer, lane: str, kinds: Sequence[bytes] = (CHECKED,)) -> dict[bytes, dict[int, float]]:
    """Bytes a second, by kind and tokens of the prompt; the kinds take turns."""
    peer.ask("serve", lane)
    try:
        return asyncio.run(_hand_over(f"127.0.0.1:{peer.answer()}", lane, kinds))
    finally:
        peer.ask("stop serving")


async def _hand_over(address: str, lane: str, kinds: Sequence[bytes]) -> dict[bytes, dict[int, float]]:
    sender = KvSender(_identity("prefill"), Pages(), **_settings(lane))
    rates: dict[bytes, dict[int, float]] = {kind: {} for kind in kinds}
    ids = itertools.count()
    try:
        for num_tokens in (min(PROMPTS), *PROMPTS):  # once more: the first makes the pair
            seconds = dict.fromkeys(kinds, 0.0)
            for _ in range(HAND_OFFS):
                for kind in kinds:
                    begin = time.perf_counter()
                    name = kind + next(ids).to_bytes(16 - len(kind), "big")
                    outgoing = await sender.open(name, address, "decode-1", (0, num_tokens))
                    outgoing.extend(num_tokens)
                    await outgoing.seal([])
                    seconds[kind] += time.perf_counter() - begin
            moved = HAND_OFFS * chunk_bytes(LAYOUT, ChunkRange((0, LAYOUT.num_layers), (0, num_tokens)))
            for kind in kinds:
                rates[kind][num_tokens] = moved / seconds[kind]
    finally:
        await sender.close()
    return rates
