"""What the receiving side needs of a decode engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import PagewireError


@dataclass(frozen=True)
class ReceiveStats:
    """What one transfer brought, all of it verified."""

    bytes: int
    chunks: int
    tokens: int
    lane: str


class KvSink(Protocol):
    """Where KV goes: the decode engine.

    For every transfer: `bind`; if that returns, any number of `scatter`; then either `sealed` or
    `failed`, unless the sink itself has ended the transfer with KvChannelServicer.abort.
    """

    async def bind(self, transfer_id: bytes, token_begin: int, token_end: int) -> None:
        """Takes pages for prompt tokens [begin, end). Raises a PagewireError, which the peer is told."""

    def scatter(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        """Copies KV [layers, 2, tokens, kv_heads, head_dim] into the pages; called on a lane thread.

        Returns the checksum of what it copied, which is not yet known to be right: the pages are the transfer's alone
        until `sealed`, before which what was wrong has come again or the transfer has failed. Raises Cancelled when the
        transfer is no longer valid; it must look, as its end may have come meanwhile.
        """

    async def sealed(self, transfer_id: bytes, received: ReceiveStats, first_tokens: Sequence[pb.SampledToken]) -> None:
        """All of it is in the pages. A PagewireError raised here is told to the peer; `failed` does not follow."""

    def failed(self, transfer_id: bytes, error: PagewireError) -> None:
        """The transfer will not be completed. Idempotent; may come while `bind` runs, and again after it."""
