"""What the rows of one step look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pagewire_kernels import ops
from torch import Tensor

KV_SCALE = 1.0  # of an fp8 cache: keys and values of these models lie well within e4m3's 448, and saturate there


@dataclass(frozen=True)
class Attention:
    """The first `num_decode` of B sequences have one row each; the others' chunks follow, packed."""

    num_decode: int
    block_tables: Tensor  # int32 [B, max_blocks]
    seq_lens: Tensor  # int32 [B], this step's tokens included; 0: a padding row
    chunk_start: Tensor | None  # int32 [B - num_decode + 1], first row of each chunk, the first one's is 0
    workspace: ops.DecodeWorkspace

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int, out: Tensor | None = None) -> Tensor:
        """q [T, H, D] -> [T, H, D], over the cache with this step's keys and values in it."""
        out, n, scale = torch.empty_like(q) if out is None else out, self.num_decode, q.shape[-1] ** -0.5
        if n:
            ops.paged_decode(
                q[:n], k_cache, v_cache, self.block_tables[:n], self.seq_lens[:n], scale, window,
                k_scale=KV_SCALE, v_scale=KV_SCALE, out=out[:n], workspace=self.workspace,
            )  # fmt: skip
        if self.chunk_start is not None:
            ops.paged_prefill(
                q[n:], k_cache, v_cache, self.block_tables[n:], self.chunk_start, self.seq_lens[n:], scale, window,
                k_scale=KV_SCALE, v_scale=KV_SCALE, out=out[n:],
            )  # fmt: skip
        return out
