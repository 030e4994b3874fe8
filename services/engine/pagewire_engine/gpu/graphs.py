"""CUDA graphs that share their memory: of two, one runs at a time, and neither leaves anything in it for the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Recorder:
    """Makes graphs of what is called again and again; on a CPU (tests) that just runs."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._pool: Any = None

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What does again what `compute` does: the same kernels on the same memory.

        The largest is best recorded first: the others then fit in the memory it took.
        """
        if not self._is_gpu:
            return compute
        compute()  # compiles the kernels, which capturing forbids
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        self._pool = graph.pool()
        return graph.replay
