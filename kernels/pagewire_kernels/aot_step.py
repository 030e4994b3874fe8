"""What runs between matrix products and the choice of tokens, as launched for Llama 3 8B and a small model (aot.py)."""

import triton

from pagewire_kernels import activation, norm, rope_kv, sample, sample_choice, sample_weights, token_ids
from pagewire_kernels.compile_ahead import Entry, make_entry
from pagewire_kernels.e4m3 import num_warps

HIDDEN, INTERMEDIATE = 4096, 14336
VOCABULARY = 128256


def step_entries() -> list[Entry]:
    """bf16, with e4m3 outputs and caches; one norm in fp32."""
    table = [_norm("bf16", "bf16"), _norm("fp32", "fp32"), _norm("bf16", "fp8e4nv")]
    table += [_silu("bf16"), _quantize(silu=True), _quantize(silu=False)]
    table += [_rope("llama-8b", (32, 8, 128), "bf16", False), _rope("llama-8b", (32, 8, 128), "fp8e4nv", False)]
    table += [_rope("qwen3-0.6b", (16, 8, 128), "bf16", True), _rope("smollm2-135m", (9, 3, 64), "bf16", False)]
    return table + _token_ids() + _sampling()


def _norm(dtype: str, out: str) -> Entry:
    kinds = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), f"*{dtype}")
    kinds |= {"out_ptr": f"*{out}", "scales_ptr": "*fp32", "eps": "fp32"}
    block = triton.next_power_of_2(HIDDEN)
    config: dict[str, int | bool] = {"E": HIDDEN, "ADD": True, "QUANTIZE": out == "fp8e4nv", "BLOCK_E": block}
    config |= {"INTERPRETED": False, "PDL": True, "num_warps": num_warps(block)}
    return make_entry(f"rms_norm_residual {dtype} to {out}", norm.rms_norm_residual_kernel, kinds, config)


def _silu(dtype: str) -> Entry:
    kinds = dict.fromkeys(("out_ptr", "gate_up_ptr"), f"*{dtype}")
    config: dict[str, int | bool] = {"WIDTH": INTERMEDIATE, "BLOCK": 1024, "PDL": True, "num_warps": 4}
    return make_entry(f"silu_and_mul {dtype}", activation.silu_and_mul_kernel, kinds, config)


def _quantize(*, silu: bool) -> Entry:
    width = INTERMEDIATE if silu else HIDDEN
    block = triton.next_power_of_2(width)
    kinds = {"out_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "x_ptr": "*bf16"}
    config: dict[str, int | bool] = {"K": width, "SILU": silu, "BLOCK": block, "INTERPRETED": False, "PDL": True}
    name = "silu_and_mul_fp8 bf16" if silu else "quantize_fp8_rows bf16"
    return make_entry(name, activation.quantize_rows_kernel, kinds, config | {"num_warps": num_warps(block)})


def _rope(family: str, heads: tuple[int, int, int], cache: str, with_norm: bool) -> Entry:
    num_heads, num_kv_heads, head_dim = heads
    kinds = dict.fromkeys(("q_out_ptr", "qkv_ptr", "q_norm_ptr", "k_norm_ptr"), "*bf16")
    kinds |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), f"*{cache}")
    kinds |= {"positions_ptr": "*i32", "slot_mapping_ptr": "*i64", "cos_sin_ptr": "*fp32"}
    kinds |= dict.fromkeys(("eps", "k_scale", "v_scale"), "fp32")
    kinds |= dict.fromkeys(("stride_qkv", "stride_kb", "stride_vb"), "i32")
    config: dict[str, int | bool] = {"H": num_heads, "KVH": num_kv_heads, "D": head_dim, "BLOCK_SIZE": 16}
    config |= {"Q_NORM": with_norm, "K_NORM": with_norm, "FP8": cache == "fp8e4nv", "INTERPRETED": False}
    config |= {"PDL": True}
    config |= rope_kv.launch(num_kv_heads, head_dim)
    return make_entry(f"rope_write_kv {family} to {cache}", rope_kv.rope_write_kv_kernel, kinds, config)


def _token_ids() -> list[Entry]:
    names = ("input_ids_ptr", "previous_tokens_ptr", "counts_ptr", "seats_ptr", "tokens_ptr")
    kinds = dict.fromkeys(names, "*i32") | dict.fromkeys(("num_tokens", "num_rows", "stride_seat"), "i32")
    config: dict[str, int | bool] = {"BLOCK": 256, "num_warps": 4}
    return [
        make_entry("resolve_input_ids", token_ids.resolve_input_ids_kernel, kinds, config),
        make_entry("count_tokens", token_ids.count_tokens_kernel, kinds, config),
    ]


def _sampling() -> list[Entry]:
    floats: tuple[str, ...] = (
        "scaled_ptr",
        "chunk_max_ptr",
        "chunk_masses_ptr",
        "list_p_ptr",
        "temperature_ptr",
        "min_p_ptr",
    )
    floats += ("repetition_ptr", "presence_ptr", "frequency_ptr", "bias_values_ptr")
    integers: tuple[str, ...] = (
        "chunk_first_ptr",
        "chunk_counts_ptr",
        "list_id_ptr",
        "bitmask_ptr",
        "seats_ptr",
        "num_chosen_ptr",
    )
    integers += ("min_tokens_ptr", "banned_ids_ptr", "bias_ids_ptr", "counts_ptr", "top_k_ptr", "out_tokens_ptr")
    scalars = ("V", "num_chunks", "stride_logits", "stride_plain", "stride_change", "stride_banned", "stride_bias")
    kinds = dict.fromkeys(floats, "*fp32") | dict.fromkeys(integers, "*i32")
    kinds |= dict.fromkeys((*scalars, "stride_counts"), "i32") | {"logits_ptr": "*bf16"}
    kinds |= dict.fromkeys(("chunk_sum_ptr", "top_p_ptr", "uniforms_ptr"), "*fp64")
    chunks: dict[str, int | bool] = {"CHUNK": sample.CHUNK, "num_warps": 8}
    block_c = triton.next_power_of_2(triton.cdiv(VOCABULARY, sample.CHUNK))
    changes: dict[str, int | bool] = {"MASKED": True, "MAX_BANNED": 16, "MAX_BIAS": 320}
    choice: dict[str, int | bool] = {"BLOCK_C": block_c, "BLOCK_L": sample.LIST_BLOCK}
    return [
        make_entry("sample change bf16", sample_weights.change_kernel, kinds, chunks | changes),
        make_entry("sample weigh", sample_weights.weigh_kernel, kinds, chunks | {"BLOCK_C": block_c}),
        make_entry("sample choose", sample_choice.choose_kernel, kinds, chunks | choice),
    ]
