"""Plain torch for the steps of a layer between its matrix products. Shapes as in reference.py; E hidden size.

Nothing reads a tensor back, so these can be traced with shapes alone, as a CUDA graph would capture the kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def rms_norm_residual(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """As ops.rms_norm_residual."""
    out.copy_(_add_and_normalise(x, residual, weight, eps))


def rms_norm_residual_fp8(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scales: Tensor
) -> None:
    """As ops.rms_norm_residual_fp8."""
    quantize_fp8_rows(_add_and_normalise(x, residual, weight, eps), out, scales)


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """As ops.silu_and_mul."""
    out.copy_(_silu_and_mul(gate_up))


def silu_and_mul_fp8(gate_up: Tensor, out: Tensor, scales: Tensor) -> None:
    """As ops.silu_and_mul_fp8."""
    quantize_fp8_rows(_silu_and_mul(gate_up), out, scales)


def quantize_fp8_rows(x: Tensor, out: Tensor, scales: Tensor) -> None:
    """As ops.quantize_fp8_rows."""
    rows = x.float()
    largest = rows.abs().amax(-1)
    limit = torch.full_like(largest, FP8_MAX)  # a tensor: with a number torch multiplies by the reciprocal
    inverse = torch.where(largest > 0, limit / largest, 0.0)
    scales.copy_(largest / limit)
    out.copy_(to_fp8(rows * inverse[:, None]))


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
    k_scale: float,
    v_scale: float,
) -> None:
    """As ops.rope_write_kv."""
    num_heads, head_dim = q_out.shape[1:]
    num_kv_heads = k_cache.shape[2]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    q_out.copy_(_rotate(_normalise_heads(q, q_norm, eps), cos, sin))
    _write(_rotate(_normalise_heads(k, k_norm, eps), cos, sin), k_cache, slot_mapping, k_scale)
    _write(v, v_cache, slot_mapping, v_scale)


def resolve_input_ids(input_ids: Tensor, previous_tokens: Tensor) -> None:
    """As ops.resolve_input_ids."""
    pending = previous_tokens.index_select(0, (-1 - input_ids).clamp(min=0)).clamp(min=0).to(input_ids.dtype)
    input_ids.copy_(torch.where(input_ids < 0, pending, input_ids))


def to_fp8(values: Tensor) -> Tensor:
    """e4m3 nearest to float32 values, saturating."""
    return values.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _add_and_normalise(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """fp32 sums, rounded to residual's dtype; the norm reads what was rounded, and rounds before the weight."""
    if x is not None:
        residual.copy_(residual.float() + x.float())
    hidden = residual.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return (hidden.to(weight.dtype) * weight).float()


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    """The order of casts is Hugging Face's: SiLU rounds to the dtype, then multiply."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _normalise_heads(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] by cos, sin float32 [T, 1, D / 2]: fp32 arithmetic, x's dtype out."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _write(rows: Tensor, cache: Tensor, slot_mapping: Tensor, scale: float) -> None:
    """Rows [T, KVH, D] into the slots that are not negative.

    A padding row repeats the first real one, so that no two rows differ about a slot; if there is none, all rewrite
    slot 0 with what it holds.
    """
    real = slot_mapping >= 0
    some = real.any()
    index = torch.arange(rows.shape[0], device=rows.device)
    source = torch.where(real, index, real.int().argmax())
    slots = torch.where(some, slot_mapping[source], 0).long()
    block_size = cache.shape[1]
    place = slots // block_size, slots % block_size
    if cache.dtype == FP8:
        values, flat = to_fp8(rows.float() / scale).view(torch.uint8), cache.view(torch.uint8)
    else:
        values, flat = rows.to(cache.dtype), cache
    flat[place] = torch.where(some, values[source], flat[place])
