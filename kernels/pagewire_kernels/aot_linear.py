"""Products with quantized weights, as launched for each number of rows (aot.py)."""

from pagewire_kernels import dequantize, gemm_gated, gemm_quantized, gemv
from pagewire_kernels.compile_ahead import Entry, make_entry
from pagewire_kernels.weight_tiles import DENSE, FP8_ROWS, INT4_GROUPS, INT8_GROUPS, INT8_ROWS

# Stored weight, scales, activations of each kind, and its group.
KINDS = {
    "int8 rows": (INT8_ROWS.value, "i8", "fp32", "bf16", 0),
    "int8 groups of 64": (INT8_GROUPS.value, "i8", "fp32", "bf16", 64),
    "int4 groups of 32": (INT4_GROUPS.value, "u8", "fp16", "bf16", 32),
    "int4 groups of 128": (INT4_GROUPS.value, "u8", "fp16", "bf16", 128),
    "fp8 rows": (FP8_ROWS.value, "fp8e4nv", "fp32", "fp8e4nv", 0),
}
ONE_ROW = {"bf16": (DENSE.value, "bf16", "bf16", "bf16", 0)}
NUM_OUTPUTS = 4096


def linear_entries() -> list[Entry]:
    """One row, the tile of each number of rows, and split sums."""
    table = [_gemm(kind, num_rows, 1) for kind in KINDS for num_rows in (16, 32, 64, 128)]
    table += [_gemm(kind, 16, 4) for kind in ("int8 rows", "int4 groups of 32")]
    table += [_reduce(kind) for kind in ("int8 rows", "fp8 rows")] + [_gated(num_rows) for num_rows in (64, 128)]
    return [_gemv(kind) for kind in (*KINDS, "bf16")] + table + [_dequantize(kind) for kind in list(KINDS)[:-1]]


def _kinds(kind: str) -> dict[str, str]:
    _, weight, scales, x, _ = (KINDS | ONE_ROW)[kind]
    kinds = {"out_ptr": "*bf16", "partial_ptr": "*fp32", "x_ptr": f"*{x}", "weight_ptr": f"*{weight}"}
    kinds |= {"scales_ptr": f"*{scales}", "x_scales_ptr": "*fp32", "bias_ptr": "*bf16"}
    return kinds | dict.fromkeys(("M", "N", "K"), "i32")


def _gemv(kind: str) -> Entry:
    stored, _, _, _, group = (KINDS | ONE_ROW)[kind]
    config: dict[str, int | bool] = {"KIND": stored, "GROUP": group, "HAS_BIAS": True, "PDL": True}
    words = {"weight_ptr": "*i32"} if stored == INT4_GROUPS.value else {}
    return make_entry(f"gemv {kind}", gemv.gemv_kernel, _kinds(kind) | words, config | gemv.launch(stored, NUM_OUTPUTS))


def _gemm(kind: str, num_rows: int, splits: int) -> Entry:
    stored, _, _, x, group = KINDS[kind]
    config: dict[str, int | bool] = {"KIND": stored, "GROUP": group, "HAS_BIAS": True, "SPLITS": splits}
    config |= {"TILES_PER_GROUP": 8, "UPCAST": False}
    config |= gemm_quantized.launch(stored, num_rows, 1 if x == "fp8e4nv" else 2)
    label = f"gemm {kind} {num_rows} rows" + (" split" if splits > 1 else "")
    return make_entry(label, gemm_quantized.gemm_kernel, _kinds(kind), config)


def _gated(num_rows: int) -> Entry:
    config: dict[str, int | bool] = {"UPCAST": False, "PDL": True} | gemm_gated.launch(num_rows)
    kinds = {"out_ptr": "*bf16"} | dict.fromkeys(("M", "N", "K"), "i32")
    for name, rows in (("x_desc", config["BLOCK_M"]), ("weight_desc", config["BLOCK_N"])):
        kinds[name] = f"tensordesc<bf16[{rows}, {config['BLOCK_K']}]>"
    return make_entry(f"gemm gated {num_rows} rows", gemm_gated.gemm_gated_kernel, kinds, config)


def _dequantize(kind: str) -> Entry:
    stored, _, _, _, group = KINDS[kind]
    config: dict[str, int | bool] = {"KIND": stored, "GROUP": group}
    return make_entry(
        f"dequantize {kind}", dequantize.dequantize_kernel, _kinds(kind), config | dequantize.launch(stored)
    )


def _reduce(kind: str) -> Entry:
    config: dict[str, int | bool] = {"KIND": KINDS[kind][0], "HAS_BIAS": True, "SPLITS": 4, "BLOCK": 512}
    return make_entry(f"gemm reduce {kind}", gemm_quantized.gemm_reduce_kernel, _kinds(kind), config | {"num_warps": 4})
