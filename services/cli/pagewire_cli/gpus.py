"""Which GPUs of the machine each worker sees."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpus:
    """Of each worker, as CUDA_VISIBLE_DEVICES names them, or None: it sees them all; and how many workers share one."""

    of_worker: tuple[tuple[str, ...] | None, ...]
    sharing: int


def available_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES leaves, or the numbers of all whose device files are there."""
    if VISIBLE in environ:
        return [name.strip() for name in environ[VISIBLE].split(",") if name.strip() not in ("", "-1")]
    files = [path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return list(map(str, range(len(files))))  # a container numbers from 0 whatever its files are called


def seen(device: str, environ: Mapping[str, str]) -> list[str]:
    """Those that workers with that --device will use."""
    return [] if device == "cpu" or torch_is_cpu_only() else available_gpus(environ)


def torch_is_cpu_only() -> bool:
    """Whether the workers cannot use a GPU, whatever the machine has. Importing torch would take a second."""
    return importlib.metadata.version("torch").endswith("+cpu")


def divide(gpus: Sequence[str], num_workers: int, per_worker: int) -> Gpus:
    """GPUs of its own for each worker where there are enough; else single ones in turn, or all for everyone."""
    if len(gpus) >= num_workers * per_worker > 0:
        return Gpus(tuple(tuple(gpus[i * per_worker : (i + 1) * per_worker]) for i in range(num_workers)), 1)
    if gpus and per_worker == 1:
        turns = tuple((gpus[i % len(gpus)],) for i in range(num_workers))
        return Gpus(turns, math.ceil(num_workers / len(gpus)))
    return Gpus((None,) * num_workers, num_workers)
