"""Random paged attention problems over a poisoned cache, and the dense fp64 answer to them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Against fp64: fp32 sums in another order, half types round once on output.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3, "check_dtype": False},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2, "check_dtype": False},
}


@dataclass
class PagedCase:
    """Packed queries over a cache whose every unused slot, block and table entry's target is NaN."""

    q: Tensor  # [T, H, D]
    keys: list[Tensor]  # per sequence [length, KVH, D]: what the cache should hold
    values: list[Tensor]
    k_cache: Tensor  # [num_blocks, block_size, KVH, D]
    v_cache: Tensor
    block_tables: Tensor  # int32 [B, max_blocks], padded with 0; block 0 is poison
    cu_seqlens_q: Tensor  # int32 [B + 1]
    seq_lens: Tensor  # int32 [B]
    scale: float

    @classmethod
    def random(
        cls,
        lengths: list[int],
        chunks: list[int],
        *,
        heads: tuple[int, int],
        block_size: int,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> "PagedCase":
        """Sequences of `lengths`, of which the last `chunks` tokens are queries; heads is (H, KVH)."""
        generator = torch.Generator().manual_seed(seed)
        num_heads, num_kv_heads = heads
        num_pages = [-(-n // block_size) for n in lengths]
        # One spare column, so that a kernel that reads past a sequence's table meets block 0.
        block_tables = torch.zeros(len(lengths), max(num_pages) + 1, dtype=torch.int32)
        free = (torch.randperm(sum(num_pages) + 1, generator=generator) + 1).tolist()
        k_cache = torch.full((sum(num_pages) + 2, block_size, num_kv_heads, head_dim), math.nan, dtype=dtype)
        v_cache = k_cache.clone()
        keys, values = [], []
        for s, (length, pages) in enumerate(zip(lengths, num_pages, strict=True)):
            blocks = [free.pop() for _ in range(pages)]
            block_tables[s, :pages] = torch.tensor(blocks)
            keys.append(torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype))
            values.append(torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype))
            for position in range(length):
                slot = blocks[position // block_size], position % block_size
                k_cache[slot] = keys[s][position]
                v_cache[slot] = values[s][position]
        return cls(
            q=(2 * torch.randn(sum(chunks), num_heads, head_dim, generator=generator)).to(dtype),
            keys=keys,
            values=values,
            k_cache=k_cache,
            v_cache=v_cache,
            block_tables=block_tables,
            cu_seqlens_q=torch.tensor([0, *chunks]).cumsum(0).int(),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            scale=head_dim**-0.5,
        )


def dense_attention(case: PagedCase, window: int) -> Tensor:
    """fp64 [T, H, D], one query row, one head and one softmax at a time, from the definition."""
    rows = []
    starts = case.cu_seqlens_q.tolist()
    num_heads = case.q.shape[1]
    for s, length in enumerate(case.seq_lens.tolist()):
        keys, values = case.keys[s].double(), case.values[s].double()
        group = num_heads // keys.shape[1]
        first = length - (starts[s + 1] - starts[s])
        for row in range(starts[s], starts[s + 1]):
            position = first + row - starts[s]
            begin = max(0, position - window + 1) if window else 0
            heads = []
            for head in range(num_heads):
                seen = slice(begin, position + 1), head // group
                weights = torch.softmax(keys[seen] @ case.q[row, head].double() * case.scale, dim=0)
                heads.append(weights @ values[seen])
            rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else case.q.double()
