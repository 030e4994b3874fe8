"""The sealed lane with a stranger on the way: bytes are read, altered, replayed, put in, left out; callers crowd in."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_core.errors import Unavailable
from pagewire_transfer import tcp_lane
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
                out.sendall(_exactly(caller, PROOF))
                while chunk := _exactly(caller, SIZE):
                    self.seen += chunk
                    out.sendall(self._forge(chunk))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


@contextlib.contextmanager
def opened(
    on_address: Callable[[str], str] = lambda address: address, timeout_s: float = TIMEOUT_S
) -> Iterator[tuple[Lane, Lane]]:
    """Sender and receiver; the sender is told `on_address` of where the receiver listens."""
    stores: list[RelayStore] = []

    def to_sender(key: str, value: bytes) -> None:
        stores[0].receive(key, on_address(value.decode()).encode() if key.endswith("address") else value)

    stores.append(RelayStore(lambda key, value: stores[1].receive(key, value), timeout_s))
    stores.append(RelayStore(to_sender, timeout_s))
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(open_lane, "tcp", s, rank, "127.0.0.1", 1, timeout_s) for rank, s in enumerate(stores)]
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


def test_who_listens_on_the_way_learns_nothing() -> None:
    """The same chunk twice is not to be recognised either."""
    between, wire = Between(), torch.arange(SIZE).remainder(251).to(torch.uint8)
    with opened(between.instead_of) as (sender, receiver):
        for _ in range(2):
            assert torch.equal(received(receiver, sent(sender, wire)), wire)
    plain, seen = bytes(wire.numpy()), between.seen
    windows = {plain[i : i + 8] for i in range(251)}
    assert len(seen) == 2 * SIZE and seen[:SIZE] != seen[SIZE:]
    assert not any(seen[i : i + 8] in windows for i in range(len(seen)))


class Replay:
    """The first chunk again in the place of the second."""

    def __init__(self) -> None:
        self._first = b""

    def __call__(self, chunk: bytes) -> bytes:
        self._first = self._first or chunk
        return self._first


FORGERIES: dict[str, Callable[[], Forge]] = {
    "replayed": Replay,
    "altered": lambda: lambda chunk: chunk[:-1] + bytes([chunk[-1] ^ 1]),
    "put in": lambda: lambda chunk: b"x" + chunk,
    "left out": lambda: lambda chunk: chunk[1:] + b"x",
    "zeroed": lambda: lambda chunk: bytes(len(chunk)),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_bytes_that_are_not_the_peers_are_never_delivered(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_lane, "RECV_TIMEOUT_S", 1.0)  # for the chunk that never comes
    between = Between(FORGERIES[how]())
    with opened(between.instead_of) as (sender, receiver):
        tags = [sent(sender, chunk(i)) for i in range(2)]
        with pytest.raises(Unavailable, match="not those that the peer sealed"):
            for i, tag in enumerate(tags):
                assert torch.equal(received(receiver, tag), chunk(i))
        with pytest.raises(Unavailable):  # nor anything after them
            received(receiver, tags[1])


def test_a_connection_that_is_cut_is_noticed_at_once() -> None:
    def cut(_: bytes) -> bytes:
        raise OSError

    with opened(Between(cut).instead_of) as (sender, receiver):
        started = time.monotonic()
        with pytest.raises(Unavailable, match="closed the connection"):
            received(receiver, sent(sender, chunk(0)))
        assert time.monotonic() - started < TIMEOUT_S / 2


@given(at=st.integers(0, SIZE - 1), bit=st.integers(0, 7))
@settings(max_examples=20)
def test_no_bit_can_be_flipped(at: int, bit: int) -> None:
    def flip(data: bytes) -> bytes:
        return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]

    with opened(Between(flip).instead_of) as (sender, receiver), pytest.raises(Unavailable):
        received(receiver, sent(sender, chunk(0)))


@pytest.mark.parametrize("spoiled", [b"", bytes(16), bytes(15), bytes(17)])
def test_a_tag_that_is_not_the_chunks_is_refused(spoiled: bytes) -> None:
    with opened() as (sender, receiver):
        sent(sender, chunk(0))
        with pytest.raises(Unavailable):
            received(receiver, spoiled)


def greeting() -> bytes:
    """How a caller begins who means to show a certificate, whoever signed it: the lane asks for none."""
    out = ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="worker.pagewire.internal")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    return out.read()


def test_callers_that_are_not_the_peer_are_sent_away_and_hold_nobody_up() -> None:
    """More than are listened to at once. The third has a certificate of ours and the key of another pair, no more."""
    said = (b"", None, tcp_lane._proof(os.urandom(32)), greeting(), os.urandom(PROOF - 1), os.urandom(10 * PROOF))
    strangers: list[socket.socket] = []

    def crowd(address: str) -> str:
        host, _, port = address.partition(" ")
        for i in range(120):
            stranger, words = socket.create_connection((host, int(port))), said[i % len(said)]
            if words is None:
                stranger.close()
            elif words:
                stranger.sendall(words)
            strangers.append(stranger)
        return address

    before = psutil.Process().num_fds()
    with opened(crowd) as (sender, receiver):
        assert torch.equal(received(receiver, sent(sender, chunk(0))), chunk(0))
        for stranger in strangers:
            if stranger.fileno() >= 0:
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
                stranger.close()
    assert psutil.Process().num_fds() <= before


def test_the_port_is_open_only_while_the_pair_is_built() -> None:
    ports: list[int] = []

    def note(address: str) -> str:
        ports.append(int(address.split()[1]))
        return address

    with opened(note), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]))


def test_a_stranger_in_the_receivers_place_gets_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the address hears the proof, which opens no other lane, and nothing else."""
    monkeypatch.setattr(tcp_lane, "_BUILD_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as fake:
        address = f"127.0.0.1 {fake.getsockname()[1]}"
        with pytest.raises(Unavailable, match="tcp lane failed"), opened(lambda _: address, 2.0):
            pass
        caller, _ = fake.accept()
        with caller:
            assert len(_exactly(caller, 1000)) == PROOF


def test_a_receiver_whose_key_is_none_is_not_called() -> None:
    store = RelayStore(lambda key, value: None, TIMEOUT_S)
    store.receive("epoch-1/key", b"short")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store.receive("epoch-1/address", f"127.0.0.1 {listener.getsockname()[1]}".encode())
        store.receive("epoch-1/accepted", b"yes")
        with pytest.raises(Unavailable, match="the peer's key has 5 bytes, not 32"):
            open_lane("tcp", store, 0, "127.0.0.1", 1, TIMEOUT_S)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_shared_memory_is_closed_to_other_users() -> None:
    """A peer on the same host opens it through /proc, which the kernel allows to processes of the same user alone."""
    told: list[bytes] = []
    store = RelayStore(lambda key, value: told.append(value), TIMEOUT_S)
    attempt = "import os, sys; os.setgid(65534); os.setuid(65534); os.open(sys.argv[1], os.O_RDWR)"

    def as_nobody(path: str) -> str:
        return subprocess.run([sys.executable, "-I", "-c", attempt, path], capture_output=True, text=True).stderr

    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(open_lane, "shm", store, 1, "127.0.0.1", 1, TIMEOUT_S)
        while not told:
            time.sleep(0.01)
        pid, number = map(int, told[0].split())
        path = f"/proc/{pid}/fd/{number}"
        assert "memfd" in os.readlink(path)
        assert "PermissionError" in as_nobody(path)
        store.receive("epoch-1/mapped", b"yes")
        lane = opening.result()
        held = [p for p in os.scandir("/proc/self/fd") if "pagewire-kv" in os.readlink(p.path)]
        assert held and all("PermissionError" in as_nobody(f"/proc/{pid}/fd/{p.name}") for p in held)
        lane.close()
