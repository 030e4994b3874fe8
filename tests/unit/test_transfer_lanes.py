"""Which lanes there are, and how two ends of one find each other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pagewire_core.errors import StartupError, Unavailable
from pagewire_transfer.lanes import GrpcLane, Lane, available_lanes, open_lane
from pagewire_transfer.relay_store import RelayStore


def test_auto_is_what_works_here_best_first() -> None:
    assert available_lanes("auto", "cpu") == ["gloo", "grpc"]


def test_named_lanes_keep_their_order() -> None:
    assert available_lanes("grpc, gloo,grpc", torch.device("cpu")) == ["grpc", "gloo"]


@pytest.mark.parametrize("flag", ["", "tcp", "gloo,shm", "gloo,"])
def test_an_unknown_lane_is_refused_with_the_choices(flag: str) -> None:
    with pytest.raises(StartupError, match=r"is not a lane; choose auto or some of nccl, gloo, grpc"):
        available_lanes(flag, "cpu")


def test_a_lane_that_cannot_work_here_is_refused_not_ignored() -> None:
    with pytest.raises(StartupError, match="nccl does not work"):
        available_lanes("nccl,gloo", "cpu")


def relayed(timeout_s: float = 2.0) -> tuple[RelayStore, RelayStore]:
    stores: list[RelayStore] = []
    left = RelayStore(lambda key, value: stores[1].receive(key, value), timeout_s)
    right = RelayStore(lambda key, value: stores[0].receive(key, value), timeout_s)
    stores.extend((left, right))
    return left, right


def opened(name: str) -> tuple[Lane, Lane]:
    left, right = relayed()
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(open_lane, name, store, rank, "127.0.0.1", 1, 2.0)
            for rank, store in enumerate((left, right))
        ]
        return ends[0].result(), ends[1].result()


@pytest.mark.parametrize("name", ["gloo", "grpc"])
def test_bytes_cross_in_order(name: str) -> None:
    sender, receiver = opened(name)
    wires = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (1, 4096, 1_000_003)]
    with ThreadPoolExecutor(1) as thread:
        for wire in wires:
            sending = thread.submit(sender.send, wire)
            assert torch.equal(receiver.recv(wire.numel(), sender.inline(wire)), wire)
            sending.result()
    sender.close()
    receiver.close()


def test_an_interrupt_ends_a_send_that_nobody_receives() -> None:
    """Gloo completes no send without a receive and has no cancel: closing a pair must not take its timeout."""
    sender, receiver = opened("gloo")
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(sender.send, torch.zeros(1 << 20, dtype=torch.uint8))
        time.sleep(0.05)
        started = time.monotonic()
        sender.interrupt()
        with pytest.raises(Unavailable, match="gloo lane failed"):
            sending.result()
        assert time.monotonic() - started < 1
    sender.close()
    receiver.close()


def test_a_peer_that_never_comes_is_unavailable() -> None:
    store = RelayStore(lambda key, value: None, 0.1)
    with pytest.raises(Unavailable, match="gloo lane failed"):
        open_lane("gloo", store, 0, "127.0.0.1", 1, 0.1)


def test_a_closed_store_releases_who_waits_for_the_peer() -> None:
    store = RelayStore(lambda key, value: None, 30)
    threading.Timer(0.05, store.close).start()
    with pytest.raises(Unavailable, match="gloo lane failed"):
        open_lane("gloo", store, 0, "127.0.0.1", 1, 30)


def test_a_grpc_chunk_must_have_its_length() -> None:
    with pytest.raises(Unavailable, match="2 bytes came with 3"):
        GrpcLane().recv(2, b"abc")
