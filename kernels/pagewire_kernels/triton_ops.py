"""Every op as Triton kernels, under the names of ops.py."""

from pagewire_kernels.activation import quantize_fp8_rows, silu_and_mul, silu_and_mul_fp8
from pagewire_kernels.gemm_gated import gemm_gated
from pagewire_kernels.gemm_quantized import gemm_fp8, gemm_w4, gemm_w8
from pagewire_kernels.gemv import gemv
from pagewire_kernels.kv_copy import pack_kv, unpack_kv, write_kv
from pagewire_kernels.norm import rms_norm_residual, rms_norm_residual_fp8
from pagewire_kernels.paged_decode import paged_decode
from pagewire_kernels.paged_prefill import paged_prefill
from pagewire_kernels.rope_kv import rope_write_kv
from pagewire_kernels.sample import sample
from pagewire_kernels.token_ids import count_tokens, resolve_input_ids

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

name = "triton"
