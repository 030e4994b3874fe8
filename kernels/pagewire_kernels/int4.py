"""How 4-bit integers lie in bytes: 32 neighbours k of a row share 16 bytes.

Byte j of the 16 holds k = j in its low half and k = 16 + j in its high half, each as value + 8. So both halves of a
run of bytes multiply runs of neighbouring activations, and any K that is a multiple of 32 fits.
"""

import torch
from torch import Tensor

RUN = 16  # bytes


def pack_int4(q: Tensor) -> Tensor:
    """int8 [N, K] with values in -8..7 -> uint8 [N, K / 2]. ValueError: K is no multiple of 32, or not int8."""
    if q.dim() != 2 or q.dtype != torch.int8 or q.shape[1] % (2 * RUN):
        raise ValueError(f"q must be int8 [N, multiple of {2 * RUN}], got {q.dtype} {tuple(q.shape)}")
    low, high = (q + 8).view(torch.uint8).view(q.shape[0], -1, 2, RUN).unbind(2)
    return (low | (high << 4)).reshape(q.shape[0], -1)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of pack_int4: int8 [N, K]."""
    runs = packed.view(packed.shape[0], -1, RUN)
    return torch.stack((runs & 15, runs >> 4), dim=2).reshape(packed.shape[0], -1).view(torch.int8) - 8
