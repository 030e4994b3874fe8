"""The KV that leaves the CPU's pages, and comes into them, is in the layout that every worker has on the wire."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny_models
import torch
from pagewire_engine.cpu.kv_cache import PackedKVCache
from pagewire_engine.models.config import read_config
from pagewire_kernels.cpu import library as cpu_library
from pagewire_kernels.cpu.build import runnable
from pagewire_kernels.cpu.library import PAGE
from pagewire_transfer.wire import checksum

LAYERS, HEADS, DIM, BLOCKS = 3, 2, 16, 12
SPANS = ((0, 160), (1, 2), (15, 17), (3, 93), (31, 160))


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


def make_cache(path: Path, variant: str, dtype: torch.dtype, block_size: int) -> PackedKVCache:
    tiny_models.make_model(path, "llama", num_key_value_heads=HEADS, head_dim=DIM)
    config = read_config(json.loads((path / "config.json").read_text()), dtype, torch.device("cpu"))
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (LAYERS, HEADS, DIM)
    return PackedKVCache(cpu_library.load(variant), config, BLOCKS, block_size, poison=True)


def places(table: list[int], block_size: int, pair: int) -> torch.Tensor:
    """[layers, 2, tokens, heads, dim] indices into the flat cache, by what kv_pages.h says of a page."""
    cells = torch.arange(LAYERS * 2 * BLOCKS * HEADS * block_size * DIM)
    pages = cells.view(LAYERS, 2, BLOCKS, HEADS, block_size // PAGE, PAGE * DIM)
    found = []
    for position in range(len(table) * block_size):
        token = position % PAGE
        page = pages[:, :, table[position // block_size], :, position % block_size // PAGE]
        keys = page[:, 0].view(LAYERS, HEADS, DIM // pair, PAGE, pair)[:, :, :, token].reshape(LAYERS, HEADS, DIM)
        values = page[:, 1].view(LAYERS, HEADS, PAGE // pair, DIM, pair)[:, :, token // pair, :, token % pair]
        found.append(torch.stack([keys, values], 1))
    return torch.stack(found, 2)


@pytest.mark.parametrize("variant", runnable())
@pytest.mark.parametrize("block_size", [16, 32])
def test_any_tokens_of_any_layers_move_between_pages_and_wire(
    variant: str, block_size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path, variant, dtype, block_size)
    table = random.Random(0).sample(range(BLOCKS), 160 // block_size)
    where = places(table, block_size, 2 if dtype == torch.bfloat16 else 1)
    for layers in ((0, LAYERS), (1, 2)):
        for begin, end in SPANS:
            cache.freed(range(BLOCKS))
            wire = torch.randn(layers[1] - layers[0], 2, end - begin, HEADS, DIM).to(dtype)
            cache.scatter(wire, table, layers, (begin, end))
            assert torch.equal(cache.kv.flatten()[where[slice(*layers), :, begin:end]], wire)
            assert int(cache.kv.isnan().logical_not().sum()) == wire.numel(), "something else was written"
            assert torch.equal(cache.gather(table, layers, (begin, end)), wire)


@pytest.mark.parametrize("variant", runnable())
def test_what_moves_is_summed_up_as_a_peer_would(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cache = make_cache(tmp_path, variant, dtype, 16)
    table = random.Random(0).sample(range(BLOCKS), 10)
    sizes = set()
    for layers in ((0, LAYERS), (1, 2)):
        for begin, end in (*SPANS, *((0, count) for count in range(1, 40))):
            wire = torch.randn(layers[1] - layers[0], 2, end - begin, HEADS, DIM).to(dtype)
            assert cache.scatter_checked(wire, table, layers, (begin, end)) == checksum(wire)
            found = torch.empty_like(wire)
            assert cache.gather_checked(table, layers, (begin, end), found) == checksum(wire)
            assert torch.equal(found, wire)
            sizes.add(wire.nbytes)
    # One that only the library sums up; less than a block of XXH3, whole ones, and some bytes more.
    assert (min(sizes) < 241) == (dtype == torch.bfloat16) and {size for size in sizes if 241 <= size < 1024}
    assert {size % 1024 == 0 for size in sizes if size > 1024} == {True, False}
