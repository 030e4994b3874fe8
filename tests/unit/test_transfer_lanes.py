"""Which lanes there are, and how two ends of one find each other."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kv_endpoints import identity
from pagewire_core.errors import Incompatible, StartupError, Unavailable
from pagewire_transfer.lanes import GrpcLane, Lane, available_lanes, gpu_id, named_lanes, offered, open_lane
from pagewire_transfer.relay_store import RelayStore
from pagewire_transfer.shm_lane import ShmLane
from pagewire_transfer.wire import MAX_CHUNK_BYTES
from structlog.testing import capture_logs


def test_auto_is_what_works_here_best_first() -> None:
    assert available_lanes("auto", "cpu") == ["shm", "gloo", "grpc"]


def test_named_lanes_keep_their_order() -> None:
    assert available_lanes("grpc, gloo,grpc", torch.device("cpu")) == ["grpc", "gloo"]


@pytest.mark.parametrize("flag", ["", "udp", "gloo,rdma", "gloo,"])
def test_an_unknown_lane_is_refused_with_the_choices(flag: str) -> None:
    with pytest.raises(StartupError, match=r"is not a lane; choose auto or some of nccl, shm, gloo, tcp, grpc"):
        available_lanes(flag, "cpu")


def test_a_lane_that_cannot_work_here_is_refused_not_ignored() -> None:
    with pytest.raises(StartupError, match="nccl does not work"):
        available_lanes("nccl,gloo", "cpu")


def test_with_tls_auto_is_what_no_stranger_can_read_or_write() -> None:
    assert available_lanes("auto", "cpu", encrypted=True) == ["shm", "tcp", "grpc"]
    assert available_lanes("gloo", "cpu", encrypted=True) == ["gloo"]  # who names it knows the network
    assert available_lanes("tcp", "cpu", encrypted=True) == ["tcp"]
    with pytest.raises(StartupError, match="tcp needs --tls-cert"):
        available_lanes("tcp", "cpu")


@pytest.mark.parametrize(("encrypted", "warned"), [(True, ["gloo"]), (False, [])])
def test_with_tls_a_lane_that_strangers_can_read_or_write_is_warned_of(encrypted: bool, warned: list[str]) -> None:
    with capture_logs() as logs:
        assert available_lanes("gloo,grpc", "cpu", encrypted) == ["gloo", "grpc"]
    assert [line["lane"] for line in logs if line["log_level"] == "warning"] == warned


def test_the_flag_is_read_before_the_device_is_known() -> None:
    """What works nowhere is told before the model is loaded."""
    assert named_lanes("auto", False) == [] and named_lanes("nccl, tcp", True) == ["nccl", "tcp"]
    with pytest.raises(StartupError, match="tcp needs --tls-cert"):
        named_lanes("nccl,tcp", False)


def test_nccl_is_for_a_gpu_that_torch_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["torch.cuda.is_available", "torch.distributed.is_nccl_available"]
    for missing in (None, *parts):
        for part in parts:
            monkeypatch.setattr(part, lambda is_there=part != missing: is_there)
        assert ("nccl" in available_lanes("auto", "cuda:0")) is (missing is None)
        assert "nccl" not in available_lanes("auto", "cpu")


def test_a_lane_that_works_between_any_two_workers_says_nothing_of_where_it_is() -> None:
    """Workers of other versions compare what is said."""
    assert [offered(lane, "GPU-1") for lane in ("nccl", "gloo", "tcp", "grpc")] == ["nccl:GPU-1", "gloo", "tcp", "grpc"]
    assert offered("nccl", "") == "nccl" and offered("shm", "").startswith("shm:")


def relayed(timeout_s: float = 20.0) -> tuple[RelayStore, RelayStore]:
    stores: list[RelayStore] = []
    left = RelayStore(lambda key, value: stores[1].receive(key, value), timeout_s)
    right = RelayStore(lambda key, value: stores[0].receive(key, value), timeout_s)
    stores.extend((left, right))
    return left, right


def opened(name: str) -> tuple[Lane, Lane]:
    left, right = relayed()
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(open_lane, name, store, rank, "127.0.0.1", 1, 20.0)
            for rank, store in enumerate((left, right))
        ]
        return ends[0].result(), ends[1].result()


@pytest.mark.parametrize("name", ["shm", "gloo", "tcp", "grpc"])
def test_bytes_cross_in_order(name: str) -> None:
    sender, receiver = opened(name)
    wires = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (1, 4096, 1_000_003, 77, 70_000, 5)]
    sizes = [*(wire.numel() for wire in wires), 0]
    with ThreadPoolExecutor(1) as thread:
        inlines = thread.map(lambda wire: send(sender, wire), wires)
        for wire, inline, next_size in zip(wires, inlines, sizes[1:], strict=True):
            with receiver.recv(wire.numel(), inline, next_size) as received:
                assert torch.equal(received, wire)
    sender.close()
    receiver.close()


def test_gloo_outlives_a_peer_that_sends_another_chunk_than_it_announced() -> None:
    """Gloo's own thread threw, and the decode worker was gone."""
    sender, receiver = opened("gloo")
    wire = torch.randint(0, 256, (57_600,), dtype=torch.uint8)
    for announced in (8448, MAX_CHUNK_BYTES):
        send(sender, wire)
        with receiver.recv(announced, b"", 0) as received:
            assert len(received) == announced
            assert torch.equal(received[:8448], wire[:8448])
    sender.close()
    receiver.close()


def send(sender: Lane, wire: torch.Tensor) -> bytes:
    staging = sender.staging(wire.numel())
    staging.copy_(wire)
    return sender.send(staging)


def send_until_stuck(sender: Lane) -> None:
    for _ in range(100):
        send(sender, torch.zeros(1 << 20, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["shm", "gloo", "tcp"])
def test_an_interrupt_ends_a_send_that_nobody_receives(name: str) -> None:
    """Gloo completes no send without a receive and has no cancel: closing a pair must not take its timeout."""
    sender, receiver = opened(name)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(send_until_stuck, sender)
        time.sleep(0.05)
        started = time.monotonic()
        sender.interrupt()
        with pytest.raises(Unavailable, match=f"{name} lane failed"):
            sending.result()
        assert time.monotonic() - started < 10
    sender.close()
    receiver.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["shm", "gloo", "tcp"])
def test_a_peer_that_never_comes_is_unavailable(name: str, rank: int) -> None:
    store = RelayStore(lambda key, value: None, 0.1)
    with pytest.raises(Unavailable, match=f"{name} lane failed"):
        open_lane(name, store, rank, "127.0.0.1", 1, 0.1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["shm", "gloo", "tcp"])
def test_a_closed_store_releases_who_waits_for_the_peer(name: str, rank: int) -> None:
    store = RelayStore(lambda key, value: None, 30)
    threading.Timer(0.05, store.close).start()
    with pytest.raises(Unavailable, match=f"{name} lane failed.*the control stream ended"):
        open_lane(name, store, rank, "127.0.0.1", 1, 30)


def test_shared_memory_is_a_ring_that_never_overtakes_its_reader() -> None:
    """The reader sleeps now and then; every chunk is there once, whole, in order."""
    sender, receiver = opened("shm")
    rng = random.Random(0)
    sizes = [rng.choice((1, 77, 65_536, ShmLane.most_bytes)) for _ in range(60)]

    def send_all() -> None:
        for i, size in enumerate(sizes):
            send(sender, torch.full((size,), i, dtype=torch.uint8))

    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(send_all)
        for i, size in enumerate(sizes):
            if rng.random() < 0.3:
                time.sleep(0.002)
            with receiver.recv(size, b"", 0) as wire:
                assert wire.numel() == size and bool((wire == i).all())
        sending.result()
    sender.close()
    receiver.close()


def test_shared_memory_leaves_no_file_and_no_mapping_behind() -> None:
    def traces() -> tuple[int, int]:
        gc.collect()  # of the tests before
        files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return Path("/proc/self/maps").read_text().count("pagewire-kv"), sum("pagewire-kv" in file for file in files)

    before, names = traces(), os.listdir("/dev/shm")
    sender, receiver = opened("shm")
    assert traces() == (before[0] + 2, before[1] + 2)  # each mapping keeps a descriptor
    assert os.listdir("/dev/shm") == names
    for lane in (sender, receiver):
        lane.close()
        with pytest.raises(Unavailable, match="closed"), lane.recv(1, b"", 0):
            pass
    assert traces() == before


@pytest.mark.parametrize(("what", "other"), [("host_id", lambda: "another"), ("_SLOTS", 4), ("_SLOT_BYTES", 8 << 20)])
def test_workers_on_two_hosts_or_with_two_rings_do_not_share_memory(
    monkeypatch: pytest.MonkeyPatch, what: str, other: object
) -> None:
    lanes = ["shm", "gloo"]
    hello = identity("prefill").hello("i", lanes)
    assert identity("decode").choose_lane(hello, lanes) == "shm"
    monkeypatch.setattr(f"pagewire_transfer.shm_lane.{what}", other)
    assert identity("decode").choose_lane(hello, lanes) == "gloo"


@pytest.mark.parametrize(
    ("prefill_gpu", "decode_gpu", "lane"),
    [("GPU-1", "GPU-2", "nccl"), ("GPU-1", "GPU-1", "shm"), ("", "GPU-2", "shm"), ("GPU-1", "", "shm")],
)
def test_nccl_is_for_workers_on_two_gpus(prefill_gpu: str, decode_gpu: str, lane: str) -> None:
    """NCCL refuses two ranks on one GPU. An older worker says `nccl` and not where."""
    lanes = ["nccl", "shm"]
    hello = identity("prefill", gpu=prefill_gpu).hello("i", lanes)
    assert identity("decode", gpu=decode_gpu).choose_lane(hello, lanes) == lane


def test_a_worker_on_a_cpu_is_on_no_gpu() -> None:
    assert gpu_id("cpu") == ""


def test_a_grpc_chunk_must_have_its_length() -> None:
    with pytest.raises(Unavailable, match="2 bytes came with 3"), GrpcLane().recv(2, b"abc", 0):
        pass


def test_a_peer_puts_no_more_into_the_store_than_a_lane_needs() -> None:
    store = RelayStore(lambda key, value: None, 1.0)
    with pytest.raises(Incompatible, match="more into the store"):
        store.receive("k", bytes(5000))
    with pytest.raises(Incompatible, match="more into the store"):
        for i in range(100):
            store.receive(f"k{i}", b"")
