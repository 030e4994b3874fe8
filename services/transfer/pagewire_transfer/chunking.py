"""Cuts the KV that is ready into chunks. Pure."""

from __future__ import annotations

from pagewire.v1 import kv_channel_pb2 as kv

from pagewire_transfer.wire import ChunkRange, token_bytes


class ChunkPlan:
    """The chunks of prompt tokens [begin, end), of at most `limit_bytes` each, as tokens become ready.

    All layers of as many tokens as fit; where not even one token fits, groups of its layers. A chunk
    has at least one layer of one token. Together the chunks cover every layer of every token once.
    """

    def __init__(self, layout: kv.KvLayout, tokens: tuple[int, int], limit_bytes: int) -> None:
        assert tokens[0] <= tokens[1], tokens
        self._num_layers = layout.num_layers
        units = max(1, limit_bytes // token_bytes(layout))
        self._group = min(self._num_layers, units)
        self._max_tokens = max(1, units // self._num_layers)
        self._layer = 0
        self._span = 0
        self._token, self._end = tokens
        self._ready = self._token

    def extend(self, token_end: int) -> None:
        """Tokens before `token_end` are ready. Going back is ignored."""
        assert token_end <= self._end, (token_end, self._end)
        self._ready = max(self._ready, token_end)

    @property
    def end(self) -> int:
        return self._end

    @property
    def done(self) -> bool:
        """All chunks have been taken."""
        return self._token == self._end

    @property
    def has_next(self) -> bool:
        return self._token < self._ready

    def take(self) -> ChunkRange:
        """The next chunk; there must be one."""
        assert self.has_next
        if self._layer == 0:
            self._span = min(self._ready - self._token, self._max_tokens)
        layer_end = min(self._layer + self._group, self._num_layers)
        part = ChunkRange((self._layer, layer_end), (self._token, self._token + self._span))
        self._layer = layer_end % self._num_layers
        if self._layer == 0:
            self._token += self._span
        return part
