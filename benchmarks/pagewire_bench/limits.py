"""What this machine could do at best, measured where the benchmark runs: read bandwidth and matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_READ_BYTES = 512 << 20  # far more than any cache
_SIZE = 2048  # of square matrices
_REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """bytes_per_s read from memory; operations_per_s (2 per multiply-add) by the type of the operands."""

    bytes_per_s: float
    operations_per_s: dict[str, float]


class LimitMeter:
    """Measures again and again; `limits` is the best of all times, as noise only ever slows."""

    def __init__(self) -> None:
        self._memory = torch.ones(_READ_BYTES // 4, dtype=torch.int32)
        self._shortest: dict[str, float] = {}

    def measure(self) -> Limits:
        self._time("read", lambda: self._memory.amax())
        for dtype in (torch.float32, torch.bfloat16):
            left, right = torch.randn(_SIZE, _SIZE).to(dtype), torch.randn(_SIZE, _SIZE).to(dtype)
            self._time(str(dtype).removeprefix("torch."), lambda a=left, b=right: a @ b)  # type: ignore[misc]
        integers = torch.randint(-127, 127, (_SIZE, _SIZE), dtype=torch.int8)
        self._time("int8", lambda: torch._int_mm(integers, integers.t()))
        rates = {name: 2 * _SIZE**3 / seconds for name, seconds in self._shortest.items() if name != "read"}
        return Limits(_READ_BYTES / self._shortest["read"], rates)

    def _time(self, name: str, work: Callable[[], object]) -> None:
        for _ in range(_REPEATS):
            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
            self._shortest[name] = min(self._shortest.get(name, seconds), seconds)
