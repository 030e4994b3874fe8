"""What a decode worker knows of one transfer's chunks, and when it may believe it has all of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Incompatible, Unavailable

from pagewire_transfer.wire import ChunkRange, chunk_bytes, root_checksum


@dataclass
class _Announced:
    part: ChunkRange
    checksum: int
    resend: bool = False  # refused once; the peer has been asked for it again
    resent: bool = False


class Incoming:
    """Believes nothing: every range, count and checksum of the peer is checked against the offer.

    All methods raise Incompatible for a peer that breaks the rules and Unavailable for bytes that were
    damaged twice; the transfer is then lost.
    """

    def __init__(self, layout: kv.KvLayout, tokens: tuple[int, int], window: int) -> None:
        self._layout = layout
        self._tokens = tokens
        self._window = window
        self._claimed = np.zeros((layout.num_layers, tokens[1] - tokens[0]), dtype=bool)
        self._num_claimed = 0
        self._pending: dict[int, _Announced] = {}
        self._checksums: list[int] = []
        self.bytes = 0

    @property
    def chunks(self) -> int:
        """Chunks announced so far, each counted once."""
        return len(self._checksums)

    @property
    def num_tokens(self) -> int:
        return self._tokens[1] - self._tokens[0]

    def announce(self, chunk: kv.Chunk) -> ChunkRange:
        """The peer is about to send this chunk."""
        part = ChunkRange((chunk.layer_begin, chunk.layer_end), (chunk.token_begin, chunk.token_end))
        if chunk.seq in self._pending:
            self._announce_again(chunk, part)
            return part
        if chunk.seq != len(self._checksums):
            raise Incompatible(f"chunk {chunk.seq} came where chunk {len(self._checksums)} was due")
        if len(self._pending) >= self._window:
            raise Incompatible(f"chunk {chunk.seq} exceeds the window of {self._window}")
        self._claim(chunk, part)
        self._pending[chunk.seq] = _Announced(part, chunk.checksum)
        self._checksums.append(chunk.checksum)
        return part

    def _announce_again(self, chunk: kv.Chunk, part: ChunkRange) -> None:
        known = self._pending[chunk.seq]
        same = part == known.part and chunk.num_bytes == chunk_bytes(self._layout, part)
        if not known.resend or not same:
            raise Incompatible(f"chunk {chunk.seq} came again unasked, or with another range or size")
        known.resend, known.resent = False, True
        known.checksum = self._checksums[chunk.seq] = chunk.checksum

    def _claim(self, chunk: kv.Chunk, part: ChunkRange) -> None:
        begin, end = self._tokens
        (layer_begin, layer_end), (token_begin, token_end) = part.layers, part.tokens
        inside = layer_begin < layer_end <= self._layout.num_layers and begin <= token_begin < token_end <= end
        if not inside:
            raise Incompatible(
                f"chunk {chunk.seq} has layers {part.layers} and tokens {part.tokens}, outside the offer"
            )
        if chunk.num_bytes != chunk_bytes(self._layout, part):
            raise Incompatible(f"chunk {chunk.seq} has {chunk.num_bytes} bytes, not {chunk_bytes(self._layout, part)}")
        cells = self._claimed[layer_begin:layer_end, token_begin - begin : token_end - begin]
        if cells.any():
            raise Incompatible(f"chunk {chunk.seq} overlaps an earlier one")
        cells[...] = True
        self._num_claimed += cells.size

    def verified(self, seq: int) -> None:
        """The chunk's bytes match its checksum and are in their pages."""
        self.bytes += chunk_bytes(self._layout, self._pending.pop(seq).part)

    def damaged(self, seq: int) -> None:
        """The chunk's bytes do not match its checksum: it may come once more."""
        known = self._pending[seq]
        if known.resent:
            raise Unavailable(f"chunk {seq} was damaged on its way, twice")
        known.resend = True

    def seal(self, num_chunks: int, root: int) -> None:
        """Returns only if everything that was offered is here, verified, exactly once."""
        if self._pending:
            raise Incompatible(f"sealed while {len(self._pending)} chunks were unacknowledged")
        if num_chunks != self.chunks:
            raise Incompatible(f"sealed with {num_chunks} chunks, but {self.chunks} came")
        if self._num_claimed != self._claimed.size:
            raise Incompatible(f"sealed with {self._claimed.size - self._num_claimed} cells of KV missing")
        if root != root_checksum(self._checksums):
            raise Incompatible("sealed with a root checksum that its chunks do not have")
