"""The attention of reference.py with what a captured step adds: e4m3 caches, preallocated outputs, shapes alone."""

import torch
from torch import Tensor

from pagewire_kernels import reference
from pagewire_kernels.decode_workspace import DecodeWorkspace


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
) -> Tensor:
    """As ops.paged_decode. With a workspace the lengths are not read back and whole block tables are gathered."""
    attend = reference.paged_decode if workspace is None else _decode_whole_tables
    queries = _queries(q, k_cache)
    attended = attend(queries, k_cache, v_cache, block_tables, seq_lens, scale * k_scale, window)
    return _finish(attended, q, v_scale, out)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int = 0,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """As ops.paged_prefill."""
    queries = _queries(q, k_cache)
    attended = reference.paged_prefill(
        queries, k_cache, v_cache, block_tables, cu_seqlens_q, seq_lens, scale * k_scale, window
    )
    return _finish(attended, q, v_scale, out)


def _queries(q: Tensor, k_cache: Tensor) -> Tensor:
    """fp32 where the output has a scale to take before it is rounded."""
    return q if k_cache.dtype == q.dtype else q.float()


def _finish(attended: Tensor, q: Tensor, v_scale: float, out: Tensor | None) -> Tensor:
    scaled = attended if v_scale == 1.0 else attended * v_scale
    return scaled.to(q.dtype) if out is None else out.copy_(scaled)


def _decode_whole_tables(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """q [B, H, D] against every key that the tables name, the unseen ones masked."""
    batch, _, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    pages = block_tables.flatten()
    at = torch.arange(block_tables.shape[1] * k_cache.shape[1], device=q.device)
    ends = seq_lens[:, None]
    seen = at < ends
    if window:
        seen &= at >= ends - window

    def gather(cache: Tensor) -> Tensor:
        """float32 [B, KVH, S, D]; 0 where not seen, since 0 * NaN is NaN."""
        rows = cache.index_select(0, pages).view(batch, -1, num_kv_heads, head_dim).float()
        return rows.masked_fill(~seen[:, :, None, None], 0.0).transpose(1, 2)

    grouped = q.view(batch, num_kv_heads, -1, head_dim).float() * scale
    scores = (grouped @ gather(k_cache).transpose(2, 3)).masked_fill(~seen[:, None, None], -torch.inf)
    # A row that sees nothing is padding and gets zeros.
    weights = scores.softmax(-1).masked_fill(~seen[:, None, None], 0.0)
    return (weights @ gather(v_cache)).view(q.shape).to(q.dtype)
