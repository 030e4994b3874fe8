"""Memory that chunks use one after the other."""

from __future__ import annotations

import torch


class Reused:
    """One piece of memory that grows to the largest chunk; whoever takes it has it until the next `take`.

    The system provides memory when it is first written, a page at a time: for 4 MB that takes as long as copying them.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Flat uint8 of that many bytes, whatever is in them."""
        if num_bytes > len(self._memory):
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._memory.device)
        return self._memory[:num_bytes]
