"""Which implementation runs for the tensors of a device.

CUDA tensors go to the Triton kernels and CPU tensors to plain torch. The choice is made once for each device type and
logged; PAGEWIRE_KERNELS=torch or =triton forces it. Triton on CPU tensors needs TRITON_INTERPRET=1. Triton is imported
only when it is chosen, so a machine without it works.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

logger = logging.getLogger("pagewire.kernels")


@functools.cache
def implementation(device_type: str) -> ModuleType:
    """triton_ops or torch_ops for tensors on `device_type` ("cuda", "cpu"), chosen and logged on the first call.

    RuntimeError: PAGEWIRE_KERNELS holds an unknown value, or asks for Triton where it cannot run.
    """
    forced = os.environ.get("PAGEWIRE_KERNELS", "")
    if forced not in ("", "torch", "triton"):
        raise RuntimeError(f"PAGEWIRE_KERNELS={forced!r}: expected 'torch' or 'triton'")
    installed = importlib.util.find_spec("triton") is not None
    if forced == "triton":
        if not installed:
            raise RuntimeError("PAGEWIRE_KERNELS=triton, but triton is not installed")
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("PAGEWIRE_KERNELS=triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if forced == "triton" or (not forced and device_type == "cuda" and installed):
        logger.info("%s tensors: Triton kernels", device_type)
        return importlib.import_module("pagewire_kernels.triton_ops")
    if device_type == "cuda" and not forced:
        logger.warning("cuda tensors: triton is not installed, falling back to plain torch, which is much slower")
    else:
        logger.info("%s tensors: plain torch%s", device_type, " (forced by PAGEWIRE_KERNELS)" if forced else "")
    return importlib.import_module("pagewire_kernels.torch_ops")
