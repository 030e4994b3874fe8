"""Argument checks of the ops of step_ops.py, linear_ops.py and sampling_ops.py, as in checks.py."""

import torch
from torch import Tensor

from pagewire_kernels.checks import check
from pagewire_kernels.int4 import RUN
from pagewire_kernels.sampling_tensors import SamplingTensors

FP8 = torch.float8_e4m3fn
_INTEGER = (torch.int32, torch.int64)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """tensor has exactly this shape, and one of the dtypes if any are given."""
    check(
        tuple(tensor.shape) == shape and (not dtypes or tensor.dtype in dtypes),
        f"{name} must be {'/'.join(map(str, dtypes)) or 'a tensor'} {shape}, got {tensor.dtype} {tuple(tensor.shape)}",
    )


def check_norm(x: Tensor | None, residual: Tensor, weight: Tensor, out: Tensor, scales: Tensor | None) -> None:
    """residual [T, E], weight [E], x and out like residual; scales float32 [T] if out is e4m3."""
    check(residual.dim() == 2, f"residual must be [T, E], got {tuple(residual.shape)}")
    rows, width = residual.shape
    check_shape("weight", weight, (width,))
    if x is not None:
        check_shape("x", x, (rows, width))
    _check_out(out, (rows, width), scales)


def check_silu(gate_up: Tensor, out: Tensor, scales: Tensor | None) -> None:
    """gate_up [T, 2 * I], out [T, I]; scales float32 [T] if out is e4m3."""
    check(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate_up must be [T, 2 * I], got {tuple(gate_up.shape)}")
    _check_out(out, (gate_up.shape[0], gate_up.shape[1] // 2), scales)


def check_quantize(x: Tensor, out: Tensor, scales: Tensor) -> None:
    """x [T, K], out e4m3 [T, K], scales float32 [T]."""
    check(x.dim() == 2, f"x must be [T, K], got {tuple(x.shape)}")
    _check_out(out, (x.shape[0], x.shape[1]), scales)


def _check_out(out: Tensor, shape: tuple[int, int], scales: Tensor | None) -> None:
    check_shape("out", out, shape, *(() if scales is None else (FP8,)))
    if scales is not None:
        check_shape("scales", scales, shape[:1], torch.float32)


def check_rope(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    q_out: Tensor,
    caches: tuple[Tensor, Tensor],
    slot_mapping: Tensor,
) -> None:
    """Shapes as ops.rope_write_kv states them."""
    check(q_out.dim() == 3, f"q_out must be [T, H, D], got {tuple(q_out.shape)}")
    num_tokens, num_heads, head_dim = q_out.shape
    check(head_dim % 2 == 0, f"head_dim must be even, got {head_dim}")
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        check(
            cache.dim() == 4 and cache.shape == caches[0].shape and cache.shape[3] == head_dim,
            f"{name} must be [num_blocks, block_size, KVH, {head_dim}], got {tuple(cache.shape)}",
        )
        check(cache.dtype in (qkv.dtype, FP8), f"{name} must be {qkv.dtype} or {FP8}, got {cache.dtype}")
    check_shape("qkv", qkv, (num_tokens, (num_heads + 2 * caches[0].shape[2]) * head_dim))
    check_shape("cos_sin", cos_sin, (cos_sin.shape[0], head_dim), torch.float32)
    check_shape("positions", positions, (num_tokens,), *_INTEGER)
    check_shape("slot_mapping", slot_mapping, (num_tokens,), *_INTEGER)
    for name, norm in zip(("q_norm", "k_norm"), norms, strict=True):
        if norm is not None:
            check_shape(name, norm, (head_dim,))


def check_factors(x: Tensor, weight: Tensor, num_inputs: int) -> None:
    """x [M, K], weight [N, ...] for K = num_inputs."""
    check(x.dim() == 2 and weight.dim() == 2, f"x and the weight must be matrices, got {tuple(x.shape)}")
    check(x.shape[1] == num_inputs, f"x has {x.shape[1]} columns, the weight {num_inputs}")


def check_gemm(x: Tensor, weight: Tensor, num_inputs: int, out: Tensor, bias: Tensor | None) -> None:
    """x [M, K], weight [N, ...] for K = num_inputs, out [M, N], bias [N]."""
    check_factors(x, weight, num_inputs)
    check_shape("out", out, (x.shape[0], weight.shape[0]))
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))


def check_groups(scales: Tensor, weight: Tensor, num_inputs: int, group: int) -> None:
    """scales [N, K / group] for groups of 32, 64 or 128 that divide K."""
    check(group in (2 * RUN, 4 * RUN, 8 * RUN), f"group must be 32, 64 or 128, got {group}")
    check(num_inputs % group == 0, f"{num_inputs} inputs are no multiple of the group {group}")
    check_shape("scales", scales, (weight.shape[0], num_inputs // group))


def check_sample(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    uniforms: Tensor,
    num_chosen: Tensor,
    out_tokens: Tensor,
    bitmask: Tensor | None,
) -> None:
    """Shapes as ops.sample states them."""
    check(logits.dim() == 2, f"logits must be [R, V], got {tuple(logits.shape)}")
    rows, vocabulary = logits.shape
    check_shape("params.counts", params.counts, (params.temperature.shape[0], vocabulary), torch.int32)
    check_shape("seats", seats, (rows,), *_INTEGER)
    check_shape("uniforms", uniforms, (rows,), torch.float32, torch.float64)
    check_shape("num_chosen", num_chosen, (rows,), *_INTEGER)
    check_shape("out_tokens", out_tokens, (rows,), *_INTEGER)
    if bitmask is not None:
        check_shape("bitmask", bitmask, (rows, -(-vocabulary // 32)), torch.int32)
