"""Every op in plain torch, under the names of ops.py."""

from pagewire_kernels.reference import pack_kv, unpack_kv, write_kv
from pagewire_kernels.reference_linear import gemm_fp8, gemm_gated, gemm_w4, gemm_w8, gemv
from pagewire_kernels.reference_paged import paged_decode, paged_prefill
from pagewire_kernels.reference_sampling import count_tokens, sample
from pagewire_kernels.reference_step import (
    quantize_fp8_rows,
    resolve_input_ids,
    rms_norm_residual,
    rms_norm_residual_fp8,
    rope_write_kv,
    silu_and_mul,
    silu_and_mul_fp8,
)

__all__ = [
    "count_tokens",
    "gemm_fp8",
    "gemm_gated",
    "gemm_w4",
    "gemm_w8",
    "gemv",
    "pack_kv",
    "paged_decode",
    "paged_prefill",
    "quantize_fp8_rows",
    "resolve_input_ids",
    "rms_norm_residual",
    "rms_norm_residual_fp8",
    "rope_write_kv",
    "sample",
    "silu_and_mul",
    "silu_and_mul_fp8",
    "unpack_kv",
    "write_kv",
]

name = "torch"
