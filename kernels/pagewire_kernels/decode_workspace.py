"""What the programs of paged_decode leave for each other; allocated once and reused by every layer and step."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# Programs that a processor holds at once, at most: 256 registers of 64 threads and 39 KiB of shared memory each.
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """P programs leave at most two partial outputs each: of the first and of the last (sequence, kv head) they meet."""

    partial: Tensor  # float32 [P, 2, H // KVH, D]
    lse: Tensor  # float32 [P, 2, H // KVH], base 2
    arrived: Tensor  # int32 [P], zeros: how many parts a sequence has so far


def decode_workspace(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> DecodeWorkspace:
    """For a model's heads on `device`; its size does not depend on batch or length. A few MiB on a large GPU."""
    programs = max(_num_processors(device) * PROGRAMS_PER_PROCESSOR, num_kv_heads)
    group = num_heads // num_kv_heads
    return DecodeWorkspace(
        torch.empty(programs, 2, group, head_dim, dtype=torch.float32, device=device),
        torch.empty(programs, 2, group, dtype=torch.float32, device=device),
        torch.zeros(programs, dtype=torch.int32, device=device),
    )


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
