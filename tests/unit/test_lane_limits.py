"""What a lane does not wait for, take or believe, whichever it is."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch
from pagewire_core.errors import Unavailable
from pagewire_transfer import shm_lane, tcp_lane
from pagewire_transfer.lanes import open_lane
from pagewire_transfer.relay_store import RelayStore
from pagewire_transfer.shm_lane import ShmLane, host_id
from sealed_ends import opened, sent

MIB = torch.zeros(1 << 20, dtype=torch.uint8)


def nowhere(key: str, value: bytes) -> None:
    """What a peer that is not there is told."""


@pytest.mark.parametrize("name", ["shm", "gloo", "tcp"])
def test_a_receiver_that_takes_nothing_is_too_slow(name: str) -> None:
    """Whether or not anybody interrupts the sender."""
    with opened(timeout_s=0.5, lane=name) as (sender, _), pytest.raises(Unavailable, match=f"{name} lane failed"):
        for _ in range(50):
            sent(sender, MIB)


@pytest.mark.parametrize("name", ["shm", "gloo", "tcp"])
def test_a_sender_that_sends_nothing_is_too_slow(name: str) -> None:
    tag = bytes(16) if name == "tcp" else b""
    with opened(timeout_s=0.5, lane=name) as (_, receiver):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=f"{name} lane failed"), receiver.recv(1000, tag, 0):
            pass
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["shm", "gloo"])
def test_bytes_beside_a_lane_that_carries_all_of_them_are_refused(name: str) -> None:
    with opened(lane=name) as (sender, receiver):
        sent(sender, MIB)
        with pytest.raises(Unavailable, match="came with 1 bytes of data"), receiver.recv(len(MIB), b"x", 0):
            pass


def test_a_chunk_that_is_larger_than_its_place_is_refused() -> None:
    with opened(lane="shm") as (sender, receiver):
        sent(sender, MIB)
        too_much = ShmLane.most_bytes + 1
        with pytest.raises(Unavailable, match=f"{too_much} bytes for the shm lane"), receiver.recv(too_much, b"", 0):
            pass


def test_one_chunk_is_gathered_while_the_one_before_it_waits() -> None:
    with opened(timeout_s=1, lane="shm") as (sender, receiver):
        sent(sender, MIB)
        sent(sender, MIB + 1)
        for value in range(2):
            with receiver.recv(len(MIB), b"", 0) as wire:
                assert bool((wire == value).all())


@pytest.mark.parametrize("name", ["shm", "gloo", "tcp"])
def test_a_receiver_that_was_interrupted_between_two_chunks_does_not_wait_for_the_second(name: str) -> None:
    with opened(lane=name) as (sender, receiver):
        tag = sent(sender, MIB)
        with receiver.recv(len(MIB), tag, len(MIB)):
            pass
        began = time.monotonic()
        receiver.interrupt()
        with pytest.raises(Unavailable, match=f"{name} lane failed"), receiver.recv(len(MIB), tag, 0):
            pass
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW])
@pytest.mark.parametrize("size", [shm_lane._SIZE, shm_lane._SIZE - 1])
def test_memory_that_may_shrink_or_is_too_small_is_not_mapped(seals: int, size: int) -> None:
    """Reading beyond the end of a file kills the process."""
    if size < shm_lane._SIZE:
        seals |= fcntl.F_SEAL_SHRINK
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        store = RelayStore(nowhere, 1.0)
        store.receive("epoch-1/file", f"{os.getpid()} {file}".encode())
        with pytest.raises(Unavailable, match="shm lane failed"):
            open_lane("shm", store, 0, "127.0.0.1", 1, 1.0)
    finally:
        os.close(file)


@pytest.mark.parametrize("what", ["getuid", "getgid", "pid", "user"])
def test_only_processes_of_one_user_in_the_same_namespaces_are_on_one_host(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name: Callable[[], str] = host_id.__wrapped__
    ours, stat = name(), os.stat
    with monkeypatch.context() as elsewhere:
        if what.startswith("get"):
            elsewhere.setattr(os, what, lambda: 12_345)
        else:
            other = stat("/")
            elsewhere.setattr(os, "stat", lambda path: other if str(path).endswith(f"/{what}") else stat(path))
        theirs = name()
    assert ours and theirs and theirs != ours


def test_an_address_that_does_not_answer_is_not_tried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself the system tries for two minutes."""
    monkeypatch.setattr(tcp_lane, "_BUILD_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        store = RelayStore(nowhere, 20.0)
        store.receive("epoch-1/key", bytes(32))
        store.receive("epoch-1/address", f"127.0.0.1 {full.getsockname()[1]}".encode())
        threading.Timer(8, store.close).start()
        began = time.monotonic()
        with pytest.raises(Unavailable, match="timed out"):
            open_lane("tcp", store, 0, "127.0.0.1", 1, 20.0)
        assert time.monotonic() - began < 5
        for filler in fillers:
            filler.close()


def test_what_has_come_is_there_though_the_stream_has_ended() -> None:
    store = RelayStore(nowhere, 1.0)
    store.receive("k", b"v")
    store.close()
    assert store.get("k") == b"v"
    with pytest.raises(RuntimeError, match="stream ended"):
        store.get("another")


def test_who_puts_other_keys_holds_up_nobody_who_waits_for_one() -> None:
    store = RelayStore(nowhere, 0.3, most_pairs=100)
    over = threading.Event()

    def put() -> None:
        for i in range(100):
            if over.wait(0.05):
                return
            store.receive(f"k{i}", b"")

    thread = threading.Thread(target=put)
    thread.start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="did not join"):
        store.get("another")
    assert time.monotonic() - began < 2
    over.set()
    thread.join()
