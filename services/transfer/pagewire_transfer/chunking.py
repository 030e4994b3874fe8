"""Cuts the KV that is ready into chunks. Pure."""

from __future__ import annotations

from pagewire.v1 import kv_channel_pb2 as kv

from pagewire_transfer.wire import ChunkRange, token_bytes


class ChunkPlan:
    """The chunks of prompt tokens [begin, end), of at most `limit_bytes` each, as their KV becomes ready.

        layers   | final: all of them   | ahead: the first ones | not computed
        tokens   begin ............ final ............... ahead[0] ........ end

    The tokens that are ready when a chunk is taken are a region, whose layers are sent one after the other: few
    long runs of memory are faster to gather than many short ones. Chunks are groups of layers of a whole region,
    or, where not even one layer fits, equal parts of its tokens. A chunk has at least one layer of one token.
    Together the chunks cover every layer of every token once.

    least_bytes: layers that are ready ahead of others wait until they make as much; each chunk costs some 100
    microseconds.
    """

    def __init__(self, layout: kv.KvLayout, tokens: tuple[int, int], limit_bytes: int, least_bytes: int = 0) -> None:
        assert tokens[0] <= tokens[1], tokens
        self._num_layers = layout.num_layers
        self._units = max(1, limit_bytes // token_bytes(layout))  # a unit: one layer of one token
        self._least_units = least_bytes // token_bytes(layout)
        self._begin, self._end = tokens  # what is not yet taken
        self._final = self._begin
        self._ahead = (self._begin, 0)  # tokens, layers
        # The region: all layers before `_layer` are taken, and of that layer all tokens before `_column`.
        self._region_end = self._begin
        self._layer, self._column = 0, self._begin

    def extend(self, final: int, ahead: tuple[int, int] = (0, 0)) -> None:
        """Tokens before `final` are ready, those before ahead[0] in the layers before ahead[1].

        Going back is ignored.
        """
        assert max(final, ahead[0]) <= self._end, (final, ahead, self._end)
        self._final = max(self._final, final)
        self._ahead = max(self._ahead, ahead)

    @property
    def end(self) -> int:
        return self._end

    @property
    def done(self) -> bool:
        """All chunks have been taken."""
        return self._begin == self._end

    @property
    def has_next(self) -> bool:
        """Whether a chunk can be taken."""
        end = self._region_end if self._is_begun else self._next_region_end
        left = self._ready_layers(end) - self._layer
        if left <= 0 or end == self._begin:
            return False
        enough = min(self._units, self._least_units)
        return self._ready_layers(end) == self._num_layers or left * (end - self._begin) >= enough

    def take(self) -> ChunkRange:
        """The next chunk; there must be one."""
        assert self.has_next
        if not self._is_begun:
            self._region_end, self._column = self._next_region_end, self._begin
        num_tokens = self._region_end - self._begin
        if num_tokens > self._units:
            return self._take_part(num_tokens)
        group = min(self._units // num_tokens, self._ready_layers(self._region_end) - self._layer)
        part = ChunkRange((self._layer, self._layer + group), (self._begin, self._region_end))
        self._pass(group)
        return part

    def _take_part(self, num_tokens: int) -> ChunkRange:
        """Some tokens of one layer."""
        size = -(-num_tokens // -(-num_tokens // self._units))
        begin, end = self._column, min(self._column + size, self._region_end)
        part = ChunkRange((self._layer, self._layer + 1), (begin, end))
        self._column = end
        if end == self._region_end:
            self._column = self._begin
            self._pass(1)
        return part

    def _pass(self, layers: int) -> None:
        self._layer += layers
        if self._layer == self._num_layers:
            self._begin, self._layer = self._region_end, 0

    @property
    def _is_begun(self) -> bool:
        return self._layer > 0 or (self._region_end > self._begin and self._column > self._begin)

    @property
    def _next_region_end(self) -> int:
        return self._final if self._final > self._begin else max(self._ahead[0], self._begin)

    def _ready_layers(self, end: int) -> int:
        """Layers that are ready for all tokens before `end`."""
        if end <= self._final:
            return self._num_layers
        return self._ahead[1] if end <= self._ahead[0] else 0
