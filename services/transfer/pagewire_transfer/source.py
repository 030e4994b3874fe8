"""What the sending side needs of a prefill engine."""

from __future__ import annotations

from typing import Protocol

import torch


class KvSource(Protocol):
    """Where KV comes from: the prefill engine."""

    def gather(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        """Writes KV [layers, 2, tokens, kv_heads, head_dim] into `wire`, which has that shape, on the CPU.

        Returns its checksum. Called on a lane thread. Raises Cancelled if the transfer's blocks have been released.
        """
