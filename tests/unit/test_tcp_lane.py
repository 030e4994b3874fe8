"""The sealed lane with a stranger on the way: bytes are read, altered, replayed, put in, left out; or come slowly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_core.errors import Unavailable
from pagewire_transfer import tcp_lane
from pagewire_transfer.lanes import open_lane
from pagewire_transfer.relay_store import RelayStore
from sealed_ends import SIZE, TIMEOUT_S, Between, Forge, Slow, chunk, opened, received, sent


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


def test_a_chunk_that_comes_slowly_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One read may end before it is: what counts is that something comes."""
    monkeypatch.setattr(tcp_lane, "RECV_TIMEOUT_S", 0.3)
    with opened(Slow().instead_of) as (sender, receiver):
        assert torch.equal(received(receiver, sent(sender, chunk(0))), chunk(0))


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
