"""The canonical form of KV on the wire: [layers][K, V][tokens][kv heads][head_dim], contiguous, model dtype."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import xxhash
from pagewire.v1 import kv_channel_pb2 as kv

# No chunk may be larger, whatever the peer says; leaves room for the fields in one gRPC message.
MAX_CHUNK_BYTES = 8 << 20

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class ChunkRange:
    """Which part of a prompt's KV a chunk is: half-open ranges of layers and of prompt tokens."""

    layers: tuple[int, int]
    tokens: tuple[int, int]

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]

    @property
    def num_tokens(self) -> int:
        return self.tokens[1] - self.tokens[0]


def token_bytes(layout: kv.KvLayout) -> int:
    """Bytes of one token's K and V in one layer."""
    return 2 * layout.num_kv_heads * layout.head_dim * DTYPES[layout.dtype].itemsize


def chunk_bytes(layout: kv.KvLayout, part: ChunkRange) -> int:
    return part.num_layers * part.num_tokens * token_bytes(layout)


def from_bytes(layout: kv.KvLayout, part: ChunkRange, wire: torch.Tensor) -> torch.Tensor:
    """The chunk's bytes (uint8, flat) as the tensor they are; no copy."""
    shape = (part.num_layers, 2, part.num_tokens, layout.num_kv_heads, layout.head_dim)
    return wire.view(DTYPES[layout.dtype]).view(shape)


def to_bytes(chunk: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor as flat uint8; no copy."""
    return chunk.view(-1).view(torch.uint8)


def checksum(chunk: torch.Tensor) -> int:
    """XXH3-64 of a contiguous CPU tensor's bytes."""
    return xxhash.xxh3_64_intdigest(to_bytes(chunk).numpy().data)


def root_checksum(checksums: Iterable[int]) -> int:
    """XXH3-64 over the chunks' checksums, 8 bytes each, little endian, in order."""
    return xxhash.xxh3_64_intdigest(b"".join(struct.pack("<Q", value) for value in checksums))
