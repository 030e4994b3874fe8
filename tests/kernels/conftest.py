"""Kernel tests: one torch thread, and paged_case.py importable (importlib mode puts no test folder on the path).

The interpreter takes minutes for every case. The suite runs, of each test with many, the first, the last and every
third; `make test-kernels` runs all.
"""

import os
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
torch.set_num_threads(1)

_MANY = 3
_NTH = 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("PAGEWIRE_ALL_KERNEL_CASES"):
        return
    kept: list[pytest.Item] = []
    for _, group in groupby(items, key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        kept += cases if len(cases) <= _MANY else [c for i, c in enumerate(cases[:-1]) if i % _NTH == 0] + cases[-1:]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
