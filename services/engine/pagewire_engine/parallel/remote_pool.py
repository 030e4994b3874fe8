"""The pool of a rank whose memory rank 0 cannot map, since it is a GPU's: its KV goes over a socket of its own.

The rank answers from a thread beside its steps, as KVCache allows.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence

import numpy as np
import torch

from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.parallel import messages


class RemotePool:
    """Rank 0's end; one request at a time. config: of the rank's part of the model; like: a pool of the same size."""

    def __init__(self, link: socket.socket, config: ModelConfig, like: KVCache, *, poison: bool = False) -> None:
        self.num_blocks, self.block_size, self.dtype = like.num_blocks, like.block_size, like.dtype
        self._link, self._config, self._poison = link, config, poison
        self._lock = threading.Lock()

    def gather(self, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]) -> torch.Tensor:
        answer = self._ask("gather", block_table, layers, tokens)
        shape = (layers[1] - layers[0], 2, tokens[1] - tokens[0], self._config.num_kv_heads, self._config.head_dim)
        return torch.from_numpy(answer["wire"]).view(self.dtype).view(shape)

    def scatter(
        self, wire: torch.Tensor, block_table: Sequence[int], layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None:
        self._ask("scatter", block_table, layers, tokens, wire=_bytes(wire))

    def allocated(self, blocks: Sequence[int]) -> None:
        """A GPU's memory is there from the start."""

    def freed(self, blocks: Sequence[int]) -> None:
        if self._poison:
            self._ask("freed", blocks)

    def _ask(
        self,
        what: str,
        blocks: Sequence[int],
        layers: tuple[int, int] = (0, 0),
        tokens: tuple[int, int] = (0, 0),
        **more: np.ndarray,
    ) -> messages.Arrays:
        with self._lock:
            arrays = {what: np.array([*layers, *tokens]), "blocks": np.array(blocks, np.int64)}
            messages.send(self._link, arrays | more)
            return messages.receive(self._link)


def serve_pool(cache: KVCache, link: socket.socket) -> None:
    """The rank's end. Raises ConnectionError when rank 0 is gone."""
    while True:
        asked = messages.receive(link)
        [what] = asked.keys() & {"gather", "scatter", "freed"}
        begin, end, first, last = asked[what].tolist()
        blocks, layers, tokens, answer = asked["blocks"].tolist(), (begin, end), (first, last), messages.Arrays()
        if what == "gather":
            answer["wire"] = _bytes(cache.gather(blocks, layers, tokens))
        elif what == "scatter":
            wire = torch.from_numpy(asked["wire"]).view(cache.dtype)
            shape = (end - begin, 2, last - first, cache.layout.num_kv_heads, cache.layout.head_dim)
            cache.scatter(wire.view(shape), blocks, layers, tokens)
        else:
            cache.freed(blocks)
        messages.send(link, answer)


def _bytes(wire: torch.Tensor) -> np.ndarray:
    return wire.contiguous().view(-1).view(torch.uint8).numpy()
