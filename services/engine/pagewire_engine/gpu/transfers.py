"""Small host arrays -> the device, many with one copy; results -> the host, beside the next step.

Both go through page-locked memory of torch's own pool, which hands a piece out again only after the copies that used it
are done. On a CPU (tests) these are plain copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGN = 16
_TORCH = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32,
          np.dtype(np.float64): torch.float64}  # fmt: skip

Arrays = dict[str, np.ndarray]


def packed_size(arrays: Arrays) -> int:
    """Bytes that `arrays` take in one buffer."""
    return sum(_aligned(array.nbytes) for array in arrays.values())


def views(buffer: Tensor, arrays: Arrays) -> dict[str, Tensor]:
    """`buffer` uint8 as tensors like `arrays`. Equal shapes and dtypes in equal order lie at equal addresses."""
    found, begin = {}, 0
    for name, array in arrays.items():
        part = buffer[begin : begin + array.nbytes]
        found[name] = part.view(_TORCH[array.dtype]).view(array.shape)
        begin += _aligned(array.nbytes)
    return found


def send(arrays: Arrays, buffer: Tensor) -> None:
    """Copies the arrays into `buffer` (uint8, on the device, large enough), where `views` finds them."""
    staging = torch.empty(packed_size(arrays), dtype=torch.uint8, pin_memory=buffer.is_cuda)
    host, begin = staging.numpy(), 0
    for array in arrays.values():
        host[begin : begin + array.nbytes] = array.ravel().view(np.uint8)
        begin += _aligned(array.nbytes)
    buffer[: len(staging)].copy_(staging, non_blocking=True)


def upload(arrays: Arrays, device: torch.device) -> dict[str, Tensor]:
    """The arrays in new memory of the device."""
    buffer = torch.empty(packed_size(arrays), dtype=torch.uint8, device=device)
    send(arrays, buffer)
    return views(buffer, arrays)


class Downloads:
    """A stream of its own for copies to the host: they do not wait for the step that follows, nor it for them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Copies `tensors` as they will be when what is launched so far is done; call the result to wait for them."""
        stream = self._stream
        if stream is None:
            copies = [tensor.clone() for tensor in tensors]
            return lambda: copies
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
            done = torch.cuda.Event()
            done.record()
        for tensor in tensors:
            tensor.record_stream(stream)

        def wait() -> list[Tensor]:
            done.synchronize()
            return hosts

        return wait


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN
