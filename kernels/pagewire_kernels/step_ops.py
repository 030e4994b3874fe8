"""The steps of a layer between its matrix products. Re-exported by ops.py.

T tokens (rows), E hidden size, H query heads, KVH kv heads, D head_dim. Tensors are contiguous unless said otherwise;
`out` tensors are preallocated and nothing waits for the device, so that a CUDA graph can capture every call.
"""

from torch import Tensor

from pagewire_kernels.dispatch import implementation
from pagewire_kernels.reference import silu_and_mul as _silu_and_mul
from pagewire_kernels.step_checks import check_norm, check_quantize, check_rope, check_shape, check_silu


def rms_norm_residual(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """residual += x, in place; out = residual over its root mean square, times weight.

    x [T, E] or None (nothing to add), residual [T, E] in fp32, fp16 or bf16, weight [E], out [T, E]. The sum is rounded
    to residual's dtype before it is normalised, and the normalised value to weight's before it is multiplied.
    """
    check_norm(x, residual, weight, out, None)
    implementation(residual.device.type).rms_norm_residual(x, residual, weight, eps, out)


def rms_norm_residual_fp8(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales: Tensor
) -> None:
    """rms_norm_residual and then quantize_fp8_rows: out e4m3 [T, E], scales float32 [T]."""
    check_norm(x, residual, weight, out, scales)
    implementation(residual.device.type).rms_norm_residual_fp8(x, residual, weight, eps, out, scales)


def silu_and_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """[T, 2 * I] to [T, I]: silu(first half) * second half, into `out` if given. Returns it.

    Without `out`, plain torch on any [..., 2 * I].
    """
    if out is None:
        return _silu_and_mul(gate_up)
    check_silu(gate_up, out, None)
    implementation(gate_up.device.type).silu_and_mul(gate_up, out)
    return out


def silu_and_mul_fp8(gate_up: Tensor, out: Tensor, scales: Tensor) -> None:
    """silu_and_mul and then quantize_fp8_rows: out e4m3 [T, I], scales float32 [T]."""
    check_silu(gate_up, out, scales)
    implementation(gate_up.device.type).silu_and_mul_fp8(gate_up, out, scales)


def quantize_fp8_rows(x: Tensor, out: Tensor, scales: Tensor) -> None:
    """x [T, K] to out e4m3 [T, K] with scales float32 [T]: the row's largest magnitude / 448, 0 for a row of zeros."""
    check_quantize(x, out, scales)
    implementation(x.device.type).quantize_fp8_rows(x, out, scales)


def rope_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Split a fused projection, rotate queries and keys, write keys and values into the paged cache, in place.

    qkv [T, (H + 2 * KVH) * D]: the heads of q, then k, then v. q_norm, k_norm [D] or None: RMS norm of each head before
    the rotation. cos_sin float32 [max_positions, D]: cosines of the D / 2 angles, then their sines; a head's halves are
    paired. positions, slot_mapping int [T]; a negative slot is a padding row, of which nothing is written to the cache.
    q_out [T, H, D]. k_cache, v_cache [num_blocks, block_size, KVH, D] of qkv's dtype, or e4m3, which holds
    key / k_scale and value / v_scale, saturated.
    """
    check_rope(qkv, positions, cos_sin, (q_norm, k_norm), q_out, (k_cache, v_cache), slot_mapping)
    implementation(qkv.device.type).rope_write_kv(
        qkv, positions, cos_sin, q_norm, k_norm, eps, q_out, k_cache, v_cache, slot_mapping, k_scale, v_scale
    )


def resolve_input_ids(input_ids: Tensor, previous_tokens: Tensor) -> None:
    """Replace each negative id -1 - r in input_ids int [T] by previous_tokens[r], int [R], in place.

    By 0 where that is negative, which is no token: what comes after it is never told, but must be computed.
    """
    check_shape("input_ids", input_ids, (input_ids.numel(),))
    check_shape("previous_tokens", previous_tokens, (previous_tokens.numel(),))
    implementation(input_ids.device.type).resolve_input_ids(input_ids, previous_tokens)
