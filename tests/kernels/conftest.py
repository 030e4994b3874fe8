"""Kernel tests: one torch thread, and paged_case.py importable (importlib mode puts no test folder on the path)."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
torch.set_num_threads(1)
