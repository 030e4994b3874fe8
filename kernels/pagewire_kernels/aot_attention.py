"""Attention and copies of keys and values, as launched for well-known model families (aot.py)."""

from dataclasses import dataclass

import triton

from pagewire_kernels import kv_copy, paged_decode, paged_prefill
from pagewire_kernels.compile_ahead import Entry, make_entry

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1}
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a model family."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    demanding: bool = False  # large tiles


SHAPES = (
    Shape("llama-8b", 32, 8, 128, demanding=True),
    Shape("smollm2-135m", 9, 3, 64),
    Shape("phi-2", 32, 32, 80),
    Shape("gemma-2-9b", 16, 8, 256, window=4096, demanding=True),
    Shape("falcon-7b", 71, 1, 64, demanding=True),
)


def attention_entries() -> list[Entry]:
    """All shapes in bf16, the demanding ones also in fp32 and over e4m3, and one in fp16, which compiles as bf16."""
    table = [entry for shape in SHAPES for entry in _attention(shape, "bf16", "bf16")]
    for cache in ("fp32", "fp8e4nv"):
        dtype = "fp32" if cache == "fp32" else "bf16"
        table += [entry for shape in SHAPES if shape.demanding for entry in _attention(shape, dtype, cache)]
    table += _attention(SHAPES[0], "fp16", "fp16")
    return table + [entry for dtype in ("bf16", "fp32", "fp8e4nv") for entry in _copies(SHAPES[0], dtype)]


def _attention(shape: Shape, dtype: str, cache: str) -> list[Entry]:
    pointers = dict.fromkeys(("out_ptr", "q_ptr"), f"*{dtype}") | dict.fromkeys(
        ("k_cache_ptr", "v_cache_ptr"), f"*{cache}"
    )
    partials = dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32")
    indices = dict.fromkeys(("block_tables_ptr", "seq_lens_ptr", "cu_seqlens_q_ptr", "arrived_ptr"), "*i32")
    integers = ("stride_qb", "stride_qt", "stride_kb", "stride_vb", "stride_tb", "num_seqs", "num_runs")
    kinds = pointers | partials | indices | dict.fromkeys(integers, "i32") | {"scale_log2": "fp32", "v_scale": "fp32"}
    group = shape.num_heads // shape.num_kv_heads
    block_d = max(16, triton.next_power_of_2(shape.head_dim))
    heads: dict[str, int | bool] = {
        "H": shape.num_heads,
        "KVH": shape.num_kv_heads,
        "D": shape.head_dim,
        "WINDOW": shape.window,
        "BLOCK_D": block_d,
    }
    paged = {"BLOCK_SIZE": BLOCK_SIZE, "UPCAST": False}
    decode = paged_decode.launch(shape.head_dim, ITEMSIZE[dtype], ITEMSIZE[cache], group)
    prefill = paged_prefill.launch(shape.head_dim, ITEMSIZE[dtype], group)
    tiles = {"BLOCK_N": decode["BLOCK_N"], "MIN_TILES": decode["MIN_TILES"], "BLOCK_B": 128, "PDL": True}
    merging = {"BLOCK_B": 128, "MERGE": True, "PDL": True} | paged_decode.parts(group, shape.head_dim)
    label = f"{shape.name} {dtype}" if cache == dtype else f"{shape.name} {dtype} over e4m3"
    return [
        make_entry(f"paged_decode {label}", paged_decode.decode_kernel, kinds, heads | paged | decode | merging),
        make_entry(
            f"paged_decode reduce {label}",
            paged_decode.decode_reduce_kernel,
            kinds,
            heads | tiles | paged_decode.REDUCE,
        ),
        make_entry(f"paged_prefill {label}", paged_prefill.prefill_kernel, kinds, heads | paged | prefill),
    ]


def _copies(shape: Shape, dtype: str) -> list[Entry]:
    names = ("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr", "wire_ptr", "kv_cache_ptr")
    strides = ("num_tokens", "stride_kt", "stride_vt", "stride_kb", "stride_vb", "stride_cl", "stride_ck", "stride_cb")
    kinds = dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(strides, "i32") | {"slot_mapping_ptr": "*i64"}
    row = shape.num_kv_heads * shape.head_dim
    block_t, block_r = kv_copy.tile(row)
    config: dict[str, int | bool] = {"BLOCK_SIZE": BLOCK_SIZE, "ROW": row, "BLOCK_T": block_t, "BLOCK_R": block_r}
    return [
        make_entry(f"write_kv {dtype}", kv_copy.write_kv_kernel, kinds, config),
        make_entry(f"pack_kv {dtype}", kv_copy.copy_kv_kernel, kinds, config | {"TO_WIRE": True}),
        make_entry(f"unpack_kv {dtype}", kv_copy.copy_kv_kernel, kinds, config | {"TO_WIRE": False}),
    ]
