"""Two ends of a lane, and what may be between those of the sealed one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from pagewire_transfer.lanes import Lane, open_lane
from pagewire_transfer.relay_store import RelayStore

PROOF = 32  # bytes that the caller says first
SIZE = 50_000
TIMEOUT_S = 20.0
Forge = Callable[[bytes], bytes]


class Between:
    """Passes one connection's bytes on to an address, as `forge` makes them; keeps what went by.

    `forge` is given everything after the proof, chunk by chunk of SIZE bytes.
    """

    def __init__(self, forge: Forge = lambda chunk: chunk) -> None:
        self.seen = b""
        self._forge = forge
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._target = ""

    def instead_of(self, address: str) -> str:
        self._target = address
        threading.Thread(target=self._pass_on, daemon=True).start()
        return f"127.0.0.1 {self._listener.getsockname()[1]}"

    def _pass_on(self) -> None:
        host, _, port = self._target.partition(" ")
        with self._listener, contextlib.suppress(OSError):
            caller, _ = self._listener.accept()
            with caller, socket.create_connection((host, int(port))) as out:
                out.sendall(exactly(caller, PROOF))
                while chunk := exactly(caller, SIZE):
                    self.seen += chunk
                    self._say(out, self._forge(chunk))

    def _say(self, out: socket.socket, chunk: bytes) -> None:
        out.sendall(chunk)


class Slow(Between):
    """Takes longer over a chunk than one read may."""

    def _say(self, out: socket.socket, chunk: bytes) -> None:
        for part in (chunk[:1000], chunk[1000:2000], chunk[2000:]):
            out.sendall(part)
            time.sleep(0.2)


def exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


@contextlib.contextmanager
def opened(
    on_address: Callable[[str], str] = lambda address: address, timeout_s: float = TIMEOUT_S, lane: str = "tcp"
) -> Iterator[tuple[Lane, Lane]]:
    """Sender and receiver; the sender is told `on_address` of where the receiver listens."""
    stores: list[RelayStore] = []

    def to_sender(key: str, value: bytes) -> None:
        stores[0].receive(key, on_address(value.decode()).encode() if key.endswith("address") else value)

    stores.append(RelayStore(lambda key, value: stores[1].receive(key, value), timeout_s))
    stores.append(RelayStore(to_sender, timeout_s))
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(open_lane, lane, s, rank, "127.0.0.1", 1, timeout_s) for rank, s in enumerate(stores)]
        lanes = [end.result() for end in ends]
    try:
        yield lanes[0], lanes[1]
    finally:
        for lane in lanes:
            lane.close()


def sent(sender: Lane, wire: torch.Tensor) -> bytes:
    staging = sender.staging(wire.numel())
    staging.copy_(wire)
    return sender.send(staging)


def received(receiver: Lane, inline: bytes) -> torch.Tensor:
    with receiver.recv(SIZE, inline, 0) as wire:
        return wire.clone()


def chunk(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
