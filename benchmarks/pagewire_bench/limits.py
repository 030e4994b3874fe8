"""What this machine could do at best, measured where the benchmark runs: read bandwidth and matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_READ_BYTES = 512 << 20  # far more than any cache
_SIZE = 2048  # of square matrices
_SMALL = 128  # tells whether torch has anything quick for a type here
_REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """bytes_per_s read from memory; operations_per_s (2 per multiply-add) by the type of the operands.

    No type is slower than float32: it can be made that before it is multiplied.
    """

    bytes_per_s: float
    operations_per_s: dict[str, float]


class LimitMeter:
    """Measures again and again; `limits` is the best of all times, as noise only ever slows."""

    def __init__(self) -> None:
        self._memory = torch.ones(_READ_BYTES // 4, dtype=torch.int32)
        self._best: dict[str, float] = {}  # of what is done in a second

    def measure(self) -> Limits:
        self._time("read", lambda: self._memory.amax(), _READ_BYTES)
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            name = str(dtype).removeprefix("torch.")
            self._multiply(name, dtype, _SMALL)
            if self._best[name] >= self._best["float32"] / 4:
                self._multiply(name, dtype, _SIZE)
        read = self._best["read"]
        rates = {name: max(rate, self._best["float32"]) for name, rate in self._best.items() if name != "read"}
        return Limits(read, rates)

    def _multiply(self, name: str, dtype: torch.dtype, size: int) -> None:
        integers = dtype == torch.int8
        left, right = (torch.randn(size, size).mul_(30 if integers else 1).to(dtype) for _ in range(2))
        product = torch._int_mm if integers else torch.matmul
        self._time(name, lambda: product(left, right.t()), 2 * size**3)

    def _time(self, name: str, work: Callable[[], object], amount: int) -> None:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            work()
            rate = amount / (time.perf_counter() - started)
            self._best[name] = max(self._best.get(name, rate), rate)
