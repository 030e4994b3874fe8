"""How the bytes of a chunk travel from a prefill worker to a decode worker.

A lane belongs to one pair and one direction. Its order is that of the Chunk messages on the control
stream, so neither tags nor headers are needed: whoever announces a chunk must send it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import structlog
import torch
import torch.distributed as dist
from pagewire_core.errors import StartupError, Unavailable

from pagewire_transfer.group_lanes import GlooLane, NcclLane
from pagewire_transfer.relay_store import RelayStore
from pagewire_transfer.reused import Reused
from pagewire_transfer.shm_lane import ShmLane, host_id, place
from pagewire_transfer.tcp_lane import TcpLane

log = structlog.get_logger(__name__)

LANES = ("nccl", "shm", "gloo", "tcp", "grpc")  # best first
_UNPROTECTED = ("nccl", "gloo")  # whoever reaches their ports can read and write blocks


class Lane(Protocol):
    """Blocking calls, all on the pair's lane thread but for `interrupt`. Wire tensors are flat uint8 on the CPU.

    The memory of chunks belongs to the lane, which uses it again and again: new memory costs as much time as
    sending it. Every call raises Unavailable when the peer is lost or too slow; the lane is of no use after that.
    """

    name: str
    most_bytes: int  # of a chunk: larger ones travel slower, or not at all

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Where the next chunk to send is to be put; waits until what was there has been sent."""

    def send(self, wire: torch.Tensor) -> bytes:
        """Sends what `staging` gave and returns what rides in Chunk.data; the bytes may still be on their way."""

    def recv(self, num_bytes: int, inline: bytes, next_bytes: int) -> AbstractContextManager[torch.Tensor]:
        """The next chunk's bytes, for the body alone; `inline` is its Chunk.data.

        next_bytes: of the chunk after it, which may then come meanwhile; 0 if that is not yet announced.
        """

    def interrupt(self) -> None:
        """From any thread: ends a running operation as soon as can be."""

    def close(self) -> None:
        """Gives back sockets and threads. Idempotent."""


class GrpcLane:
    """Bytes inside the control message: works wherever the control stream does.

    A message is copied several times on its way. With 1 MiB that stays in the caches: half the time of 4 MiB.
    """

    name = "grpc"
    most_bytes = 1 << 20

    def __init__(self) -> None:
        self._memory = Reused()

    def staging(self, num_bytes: int) -> torch.Tensor:
        return self._memory.take(num_bytes)

    def send(self, wire: torch.Tensor) -> bytes:
        return wire.numpy().tobytes()

    @contextlib.contextmanager
    def recv(self, num_bytes: int, inline: bytes, next_bytes: int) -> Iterator[torch.Tensor]:
        if len(inline) != num_bytes:
            raise Unavailable(f"a chunk of {num_bytes} bytes came with {len(inline)} bytes of data")
        yield torch.frombuffer(bytearray(inline), dtype=torch.uint8)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def named_lanes(flag: str, encrypted: bool) -> list[str]:
    """The lanes that `--lanes` names; none for "auto". Raises StartupError for what works on no machine so started."""
    names = [] if flag == "auto" else list(dict.fromkeys(name.strip() for name in flag.split(",")))
    for name in names:
        if name not in LANES:
            raise StartupError(f"--lanes: {name!r} is not a lane; choose auto or some of {', '.join(LANES)}")
        if name == "tcp" and not encrypted:
            raise StartupError("--lanes: tcp needs --tls-cert, --tls-key and --tls-ca; use gloo on a private network")
    return names


def available_lanes(flag: str, device: torch.device | str, encrypted: bool = False) -> list[str]:
    """The lanes of `--lanes`, best first; "auto" is all that work on this device.

    encrypted: the services speak TLS. Then auto leaves out what a stranger could read or write; the tcp lane, whose
    keys travel on the control stream, works only then.

    Raises StartupError for an unknown name, or for one that was asked for and cannot work here.
    """
    works = {
        "nccl": torch.device(device).type == "cuda" and torch.cuda.is_available() and dist.is_nccl_available(),
        "shm": bool(host_id()),
        "gloo": dist.is_gloo_available(),
        "tcp": encrypted,
        "grpc": True,
    }
    if flag == "auto":
        return [name for name in LANES if works[name] and not (encrypted and name in _UNPROTECTED)]
    names = named_lanes(flag, encrypted)
    for name in names:
        if encrypted and name in _UNPROTECTED:
            log.warning("THIS LANE IS NEITHER AUTHENTICATED NOR ENCRYPTED; keep its network private", lane=name)
        if not works[name]:
            raise StartupError(f"--lanes: {name} does not work on this machine's device; leave it out or use auto")
    return names


def open_lane(name: str, store: RelayStore, rank: int, host: str, epoch: int, timeout_s: float) -> Lane:
    """Opens this side's end; blocks until the peer has opened its own. Raises Unavailable."""
    if name == "grpc":
        return GrpcLane()
    lanes: dict[str, type[GlooLane | NcclLane | ShmLane | TcpLane]] = {
        "gloo": GlooLane, "nccl": NcclLane, "shm": ShmLane, "tcp": TcpLane,
    }  # fmt: skip
    return lanes[name](store, rank, host, epoch, timeout_s)


def gpu_id(device: torch.device | str) -> str:
    """Names the GPU among those of all hosts; empty for a CPU."""
    device = torch.device(device)
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def offered(lane: str, gpu: str) -> str:
    """How a worker names one of its lanes to others. gpu: what `gpu_id` says of its device."""
    where = {"shm": place(), "nccl": gpu}.get(lane)
    return f"{lane}:{where}" if where else lane


def joins(theirs: str, ours: str) -> bool:
    """Whether a lane works between the workers that offer it so: shm within one host, nccl between two GPUs.

    NCCL refuses two ranks on one GPU. An older worker says `nccl` and not where: it may be on ours.
    """
    (name, _, their_place), (our_name, _, our_place) = theirs.partition(":"), ours.partition(":")
    if name == our_name == "nccl":
        return bool(their_place and our_place) and their_place != our_place
    return theirs == ours
