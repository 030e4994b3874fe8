"""Where the sender finds the KV of prompts that wait to be handed over."""

from __future__ import annotations

import torch
from pagewire_core.errors import Cancelled
from pagewire_engine.engine import Engine
from pagewire_engine.sequence import Request


class PromptSource:
    """KvSource over the engine: transfer id -> the prompt's blocks.

    `gather` runs in lane threads, beside the engine's steps: it reads only tokens that are final, in
    blocks that the request holds until its transfer has closed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests: dict[bytes, Request] = {}

    def __contains__(self, transfer_id: bytes) -> bool:
        return transfer_id in self._requests

    def add(self, transfer_id: bytes, request: Request) -> None:
        self._requests[transfer_id] = request

    def discard(self, transfer_id: bytes) -> None:
        self._requests.pop(transfer_id, None)

    def gather(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        request = self._requests.get(transfer_id)
        block_table = self._engine.block_table(request) if request else []
        if not block_table:
            raise Cancelled("the prompt's blocks were given back")
        return self._engine.runner.cache.gather_checked(block_table, layers, tokens, wire)
