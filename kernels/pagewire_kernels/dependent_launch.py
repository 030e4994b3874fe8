"""Programmatic dependent launch (sm_90 and later): a kernel starts while the one before it ends.

What a launch costs, some microseconds of a kernel that runs for a few, then overlaps with the tail of the kernel
before. A kernel launched so must wait before it reads or writes what others do, in every program: a kernel that has
ended means then that all before it have.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_the_kernel_before():
    """Until it has ended, with all it wrote. The next one may start from here on, to wait in its turn."""
    gdc_wait()
    gdc_launch_dependents()


ENABLED = True  # benchmarks/gpu.py compares with what kernels give one after another


def dependent(on: Tensor) -> dict[str, bool]:
    """Launch options, and the kernel's constexpr PDL, for the device of a tensor."""
    if ENABLED and is_hopper_or_later(on.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def is_hopper_or_later(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
