"""Attention and copies of keys and values as problems to check and time (gpu_kernels.py), on Llama 3 8B's heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pagewire_kernels import ops, reference, reference_paged
from torch import Tensor

BLOCK_SIZE = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One kernel on one problem."""

    name: str
    run: Callable[[], Tensor]
    expect: Callable[[], Tensor]
    num_bytes: int  # read and written at least once
    num_flops: int = 0
    exact: bool = False
    tokens: bool = False  # compared by how many differ
    peer: Callable[[], object] | None = None  # what torch has for the same problem, on CUDA


class Pages:
    """One layer of random cache and shuffled block tables for sequences of the given lengths."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, device: str) -> None:
        pages = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(pages)).int()
        self.block_tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        for s, blocks in enumerate(order.split(pages)):
            self.block_tables[s, : pages[s]] = blocks
        self.block_tables = self.block_tables.to(device)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        shape = (sum(pages), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.k_cache = torch.randn(shape, device=device).to(dtype)
        self.v_cache = torch.randn(shape, device=device).to(dtype)
        self.num_kv_bytes = 2 * sum(lengths) * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize


def decode_case(
    name: str, lengths: list[int], window: int, dtype: torch.dtype, device: str, cache: torch.dtype | None = None
) -> Case:
    """As a captured step calls it: output and workspace preallocated."""
    pages = Pages(lengths, cache or dtype, device)
    q = torch.randn(len(lengths), NUM_HEADS, HEAD_DIM, device=device).to(dtype)
    args = (q, pages.k_cache, pages.v_cache, pages.block_tables, pages.seq_lens, SCALE, window)
    seen = sum(min(length, window) if window else length for length in lengths)
    num_bytes = pages.num_kv_bytes * seen // sum(lengths) + 2 * nbytes(q)
    out = torch.empty_like(q)
    workspace = ops.decode_workspace(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, q.device)
    return Case(
        name,
        lambda: ops.paged_decode(*args, out=out, workspace=workspace),
        lambda: reference_paged.paged_decode(*args),
        num_bytes,
    )


def prefill_case(name: str, lengths: list[int], chunks: list[int], dtype: torch.dtype, device: str) -> Case:
    pages = Pages(lengths, dtype, device)
    q = torch.randn(sum(chunks), NUM_HEADS, HEAD_DIM, device=device).to(dtype)
    cu_seqlens_q = torch.tensor([0, *chunks], device=device).cumsum(0).int()
    args = (q, pages.k_cache, pages.v_cache, pages.block_tables, cu_seqlens_q, pages.seq_lens, SCALE)
    # Row r of a chunk sees length - chunk + r + 1 keys; 2 flops each for the scores and for the values.
    seen = sum(
        chunk * (length - chunk) + chunk * (chunk + 1) // 2 for length, chunk in zip(lengths, chunks, strict=True)
    )
    num_flops = 4 * seen * NUM_HEADS * HEAD_DIM
    num_bytes = pages.num_kv_bytes + 2 * nbytes(q)
    return Case(name, lambda: ops.paged_prefill(*args), lambda: reference.paged_prefill(*args), num_bytes, num_flops)


def copy_cases(num_layers: int, num_tokens: int, dtype: torch.dtype, device: str) -> list[Case]:
    num_blocks = 2 * num_tokens // BLOCK_SIZE
    shape = (num_layers, 2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    cache = torch.randn(shape, device=device, dtype=dtype)
    scratch = [torch.zeros_like(cache) for _ in range(2)]
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:num_tokens]
    layers = (0, num_layers)
    wire = reference.pack_kv(cache, slots, layers)
    k, v = wire[0, 0], wire[0, 1]

    def unpack(implementation: Callable[..., None], into: Tensor) -> Tensor:
        implementation(wire, into, slots, layers)
        return into

    def write(implementation: Callable[..., None], into: Tensor) -> Tensor:
        implementation(k, v, into[0, 0], into[0, 1], slots)
        return into[0]

    return [
        Case(
            f"write_kv {num_tokens} tokens",
            lambda: write(ops.write_kv, scratch[0]),
            lambda: write(reference.write_kv, scratch[1]),
            2 * (nbytes(k) + nbytes(v)),
            exact=True,
        ),
        Case(
            f"pack_kv {num_layers} layers {num_tokens} tokens",
            lambda: ops.pack_kv(cache, slots, layers),
            lambda: wire,
            2 * nbytes(wire),
            exact=True,
        ),
        Case(
            f"unpack_kv {num_layers} layers {num_tokens} tokens",
            lambda: unpack(ops.unpack_kv, scratch[0]),
            lambda: unpack(reference.unpack_kv, scratch[1]),
            2 * nbytes(wire),
            exact=True,
        ),
    ]


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def attention_cases(dtype: torch.dtype, device: str, scale: int) -> list[Case]:
    """`scale` divides the sizes: 1 for the real ones."""
    spread = [(200 + 61 * i) // scale for i in range(64)]
    return [
        decode_case("decode 1 x 512", [512 // scale], 0, dtype, device),
        decode_case("decode 1 x 32k", [32768 // scale], 0, dtype, device),
        decode_case("decode 8 x 4k", [4096 // scale] * 8, 0, dtype, device),
        decode_case("decode 64 x 2k", [2048 // scale] * 64, 0, dtype, device),
        decode_case("decode 128 x 0.8k", [768 // scale] * 128, 0, dtype, device),
        decode_case("decode 64 uneven 0.2k-4k", spread, 0, dtype, device),
        decode_case(
            "decode 127 x 0.2k + 1 x 32k", [256 // scale] * (127 // min(scale, 16)) + [32768 // scale], 0, dtype, device
        ),
        decode_case("decode 16 x 8k window 1k", [8192 // scale] * 16, 1024 // scale, dtype, device),
        decode_case("decode 64 x 2k e4m3", [2048 // scale] * 64, 0, dtype, device, FP8),
        decode_case("decode 1 x 32k e4m3", [32768 // scale], 0, dtype, device, FP8),
        prefill_case("prefill 1 x 4k", [4096 // scale], [4096 // scale], dtype, device),
        prefill_case("prefill chunk 1k of 16k", [16384 // scale], [1024 // scale], dtype, device),
        prefill_case(
            "prefill 1k of 2k + 32 decode rows", [2048 // scale] * 33, [1024 // scale] + [1] * 32, dtype, device
        ),
        *copy_cases(32 // min(scale, 16), 4096 // scale, dtype, device),
    ]
