"""The CPU's KV pool has its memory before a step writes it, and no more of it than is about to be used."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from pagewire_engine.cpu.kv_cache import PackedKVCache
from pagewire_engine.models.config import read_config
from pagewire_kernels.cpu import library as cpu_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")

PAGE = 4096
AHEAD = 1 << 20


@pytest.fixture
def make_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], PackedKVCache]]:
    monkeypatch.setattr("pagewire_engine.cpu.kv_cache._AHEAD_BYTES", AHEAD)
    monkeypatch.setattr("pagewire_engine.cpu.kv_cache._STRETCH_BYTES", 16 * PAGE)
    hf = json.loads((tiny_models.make_model(tmp_path, "llama") / "config.json").read_text())
    config = read_config(hf, torch.float32, torch.device("cpu"))
    before = threads()  # of other tests' pools
    monkeypatch.setattr(sys.modules[__name__], "others", before)
    yield lambda num_blocks: PackedKVCache(cpu_library.best(), config, num_blocks, 16)
    wait_until(lambda: not threads())


others: list[threading.Thread] = []


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "kv-memory" and t not in others]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def resident(cache: PackedKVCache, block: int) -> bool:
    """Whether the system has memory for a block of every layer, K and V."""
    for part in cache.kv.flatten(0, 1):
        address = part[block].data_ptr()
        there = (ctypes.c_ubyte * 1)()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address // PAGE * PAGE), ctypes.c_size_t(1), there) == 0
        if not there[0] & 1:
            return False
    return True


def test_memory_stays_ahead_of_the_blocks_in_use(make_cache: Callable[[int], PackedKVCache]) -> None:
    cache = make_cache(1 << 15)
    block_bytes = cache.kv.nbytes // cache.num_blocks
    ahead = AHEAD // block_bytes
    wait_until(lambda: resident(cache, ahead))
    assert not resident(cache, cache.num_blocks - 1)
    cache.allocated([3, cache.num_blocks // 2])
    wait_until(lambda: resident(cache, cache.num_blocks // 2 + ahead))
    assert not resident(cache, cache.num_blocks - 1)


def test_the_thread_ends_with_the_pool_and_when_there_is_no_more(make_cache: Callable[[int], PackedKVCache]) -> None:
    small = make_cache(8)
    wait_until(lambda: not threads())
    large = make_cache(1 << 15)
    assert threads()
    del small, large
    wait_until(lambda: not threads())


def test_what_is_written_meanwhile_stays(make_cache: Callable[[int], PackedKVCache]) -> None:
    cache = make_cache(1 << 12)
    writer = cache.kv.view(-1)
    for begin in range(0, len(writer), 1 << 16):
        cache.allocated([begin * cache.num_blocks // len(writer)])
        writer[begin : begin + (1 << 16)] = 7.0
    wait_until(lambda: not threads())
    assert bool((writer == 7.0).all())
