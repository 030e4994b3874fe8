"""The compiled CPU step as Python sees it: structures and functions of exports.h, and the choice of the variant."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p

from pagewire_kernels.cpu.build import BuildError, best_variant, library_path

ABI = 8
STRIP = 32  # outputs in a strip of packed weights
PAGE = 16  # tokens in a page of the packed KV layout
MAX_HEAD_DIM = 512
LEAST_SUMMED_BYTES = 241  # whose checksum is taken while they move; see xxh3.h


class Linear(ctypes.Structure):
    """A packed linear layer; see linear.h."""

    _fields_ = (
        ("kind", c_int32), ("n", c_int32), ("k", c_int32), ("group", c_int32),
        ("weight", c_void_p), ("scales", c_void_p), ("sums", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p), ("post_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        ("qkv", Linear), ("o", Linear), ("gate_up", Linear), ("down", Linear), ("window", c_int32),
    )  # fmt: skip


GATHER = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_int64)


class Peers(ctypes.Structure):
    """The ranks that share a layer; `gather(mine, everyone's, bytes)` is called on the thread that called the step."""

    _fields_ = (("rank", c_int32), ("ranks", c_int32), ("gather", GATHER))


class Model(ctypes.Structure):
    _fields_ = (
        ("hidden", c_int32), ("intermediate", c_int32), ("heads", c_int32), ("kv_heads", c_int32),
        ("head_dim", c_int32), ("layers", c_int32), ("vocab", c_int32), ("block_size", c_int32),
        ("num_blocks", c_int64), ("half", c_int32), ("eps", c_float), ("scale", c_float), ("embedding", c_void_p),
        ("cos_sin", c_void_p), ("norm", c_void_p), ("head", Linear), ("layer", ctypes.POINTER(Layer)),
        ("cache", c_void_p), ("peers", Peers),
    )  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = (
        ("num_rows", c_int32), ("num_sequences", c_int32), ("num_samples", c_int32), ("input_ids", c_void_p),
        ("query_start", c_void_p), ("seq_lens", c_void_p), ("tables", c_void_p), ("seats", c_void_p),
        ("table_stride", c_int64), ("sample_from", c_void_p), ("choices", c_void_p), ("raw", c_void_p),
        ("mask", c_void_p), ("tokens", c_void_p), ("logits", c_void_p),
        ("hidden_in", c_void_p), ("hidden_out", c_void_p),
        ("progress", c_void_p), ("progress_group", c_int32), ("progress_pipe", c_int32),
        ("hidden", c_void_p),
    )  # fmt: skip


_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "pw_abi": (c_int, ()),
    "pw_variant": (c_char_p, ()),
    "pw_cores": (c_void_p, (c_int, c_void_p, c_int, c_void_p)),
    "pw_cores_free": (None, (c_void_p,)),
    "pw_cores_rest": (None, (c_void_p,)),
    "pw_cores_borrowed": (c_int64, (c_void_p,)),
    "pw_cores_returned": (c_int64, (c_void_p,)),
    "pw_core_lines_bytes": (c_int64, ()),
    "pw_runner": (c_void_p, (c_void_p, c_int64)),
    "pw_runner_free": (None, (c_void_p,)),
    "pw_step": (c_int, (c_void_p, c_void_p, c_void_p)),
    "pw_use_huge_pages": (None, (c_void_p, c_int64)),
    "pw_touch": (None, (c_void_p, c_int64)),
    "pw_allocate": (c_void_p, (c_int64,)),
    "pw_release": (None, (c_void_p,)),
    "pw_pack_f32": (None, (c_void_p, *[c_int64] * 5, c_void_p)),
    "pw_pack_bf16": (None, (c_void_p, *[c_int64] * 5, c_void_p)),
    "pw_pack_int8": (None, (c_void_p, c_void_p, *[c_int64] * 6, c_void_p, c_void_p, c_void_p)),
    "pw_pack_int4": (None, (c_void_p, c_void_p, *[c_int64] * 6, c_void_p, c_void_p)),
    "pw_move_kv": (None, (c_void_p, c_void_p, c_int64, c_int32, c_int32, c_void_p, c_int64, c_int32, c_void_p)),
    "pw_read_bandwidth": (c_double, (c_void_p, c_void_p, c_int64, c_int)),
    "pw_peak": (c_double, (c_void_p, c_int, c_int)),
}


@functools.cache
def load(variant: str) -> ctypes.CDLL:
    """The library of one variant, built if need be. Raises BuildError."""
    path = library_path(variant)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.pw_abi() == ABI
    return library


def best() -> ctypes.CDLL:
    """The library for this CPU. Raises BuildError if there can be none."""
    return load(best_variant())
