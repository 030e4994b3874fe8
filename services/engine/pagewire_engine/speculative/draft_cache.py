"""Which tokens of each target sequence a draft model has in its own KV pool.

The tables of the target mean nothing here: the draft model's pages have another shape and another fill.

    tokens   |--------------- the target's ---------------|
    drafted                                               |- drafts that were computed -|
    KV       |-- num_computed --|

After a rejection num_computed falls back to where the drafts and the target's tokens part; what lies
behind it in the pages is written over by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pagewire_engine.block_manager import BlockManager, OutOfBlocks
from pagewire_engine.config import EngineConfig
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.seats import Seats
from pagewire_engine.sequence import Sequence
from pagewire_engine.speculative.acceptance import common_prefix


@dataclass(eq=False)
class DraftSequence:
    """A target sequence as the draft model has it."""

    target: Sequence
    seat: int
    block_table: list[int]
    num_computed: int
    num_registered: int
    drafted: Seq[int] = field(default=())  # computed behind the first `num_tokens` of the target's tokens
    num_tokens: int = 0

    @property
    def num_uncomputed(self) -> int:
        return len(self.target.tokens) - self.num_computed


class DraftCache:
    """The blocks of a draft model's pool. Pages hold as many tokens as the target's, so prefix keys are shared."""

    def __init__(self, config: EngineConfig, cache: KVCache) -> None:
        self._config = config
        self.blocks = BlockManager(config.num_blocks, freed=cache.freed, allocated=cache.allocated)
        self.seats = Seats(config.max_num_seqs, config.blocks_for(config.max_model_len))
        self._sequences: dict[Sequence, DraftSequence] = {}

    def settle(self, target: Sequence) -> DraftSequence:
        """The sequence, with num_computed true of the target's tokens as they are now."""
        seq = self._sequences.get(target)
        if seq is None:
            seq = self._sequences[target] = self._begin(target)
        if seq.num_tokens:
            came = target.tokens[seq.num_tokens : seq.num_tokens + len(seq.drafted)]
            # The last token's logits are always wanted again.
            seq.num_computed = min(seq.num_tokens + common_prefix(seq.drafted, came), len(target.tokens) - 1)
            seq.drafted, seq.num_tokens = (), 0
        self._register(seq)
        return seq

    def _begin(self, target: Sequence) -> DraftSequence:
        # At least the last token is computed: its logits give the first draft.
        cached = self.blocks.match(self._keys(target, len(target.tokens) - 1))
        seat = self.seats.take(cached)
        return DraftSequence(target, seat, cached, len(cached) * self._config.block_size, len(cached))

    def _keys(self, target: Sequence, num_tokens: int) -> list[bytes]:
        return target.keys.extend(target.tokens, num_tokens) if self._config.enable_prefix_caching else []

    def _register(self, seq: DraftSequence) -> None:
        """Makes full pages findable; those of the target's own tokens only."""
        keys = self._keys(seq.target, seq.num_computed)
        for index in range(seq.num_registered, len(keys)):
            block = self.blocks.register(seq.block_table[index], keys[index])
            if block != seq.block_table[index]:
                seq.block_table[index] = block
                self.seats.put(seq.seat, index, [block])
        seq.num_registered = max(seq.num_registered, len(keys))

    def grow(self, seq: DraftSequence, num_tokens: int) -> bool:
        """Gives the sequence blocks for `num_tokens` tokens; False, and nothing changed, if there are too few."""
        need = self._config.blocks_for(num_tokens) - len(seq.block_table)
        if need <= 0:
            return True
        try:
            more = self.blocks.allocate(need)
        except OutOfBlocks:
            return False
        self.seats.put(seq.seat, len(seq.block_table), more)
        seq.block_table += more
        return True

    def drop(self, target: Sequence) -> None:
        """Forgets a sequence. Idempotent."""
        seq = self._sequences.pop(target, None)
        if seq is not None:
            self.blocks.release(seq.block_table)
            self.seats.leave(seq.seat)

    def check(self) -> None:
        """Raises AssertionError if the books disagree."""
        self.blocks.check([seq.block_table for seq in self._sequences.values()])
        assert self.seats.num_taken == len(self._sequences), "a seat is lost"
