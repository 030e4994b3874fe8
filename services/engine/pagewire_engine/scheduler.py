"""Decides what the next step computes. Pure: it reads the state it is given and changes nothing.

Policy, as in Sarathi-Serve (arXiv 2403.02310) and vLLM: every running sequence that decodes gets its
token; what is left of the token budget goes to prompts that are partly computed, then to waiting ones,
in order of arrival. When a decoding sequence finds no block, the sequence that arrived last is
preempted: it gives its blocks back and is computed anew later (mostly from the prefix cache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pagewire_engine.config import EngineConfig
from pagewire_engine.sequence import Sequence


@dataclass(frozen=True)
class Decision:
    """preempted go back to waiting; admitted join running; scheduled compute that many tokens each."""

    preempted: tuple[Sequence, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    scheduled: tuple[tuple[Sequence, int], ...] = ()


@dataclass(frozen=True)
class Pool:
    """What a decision must know of the blocks.

    free: blocks that can be allocated; reserved: of these, promised to transfers, not for new
    sequences. lookup: blocks of a sequence's cached prefix. ref_count: holders of a block.
    """

    free: int
    reserved: int
    lookup: Callable[[Sequence], Seq[int]]
    ref_count: Callable[[int], int]


def decide(running: Seq[Sequence], waiting: Iterable[Sequence], pool: Pool, config: EngineConfig) -> Decision:
    """running and waiting in order of arrival."""
    scheduled: list[tuple[Sequence, int]] = []
    preempted: list[Sequence] = []
    budget, free = config.max_num_batched_tokens, pool.free
    for seq in sorted(running, key=lambda s: s.num_uncomputed > 1):
        if seq in preempted or budget == 0:
            continue
        chunk = min(seq.num_uncomputed, budget)
        need = blocks_to_grow(seq, chunk, pool.ref_count, config)
        while need > free and seq not in preempted:
            victim = next(s for s in reversed(running) if s not in preempted)
            preempted.append(victim)
            free += sum(pool.ref_count(block) == 1 for block in victim.block_table)
        if seq in preempted:
            continue
        free -= need
        budget -= chunk
        scheduled.append((seq, chunk))
    if preempted:
        return Decision(preempted=tuple(preempted), scheduled=tuple(s for s in scheduled if s[0] not in preempted))
    admitted = _admit(running, waiting, pool, config, free, budget, scheduled)
    return Decision(admitted=tuple(admitted), scheduled=tuple(scheduled))


def _admit(
    running: Seq[Sequence], waiting: Iterable[Sequence], pool: Pool, config: EngineConfig,
    free: int, budget: int, scheduled: list[tuple[Sequence, int]],
) -> list[Sequence]:  # fmt: skip
    """Takes sequences from the head of the queue while they fit; appends them to `scheduled`."""
    admitted: list[Sequence] = []
    seats = config.max_num_seqs - sum(_seats(seq) for seq in running)
    for seq in waiting:
        cached = pool.lookup(seq)
        unheld = sum(pool.ref_count(block) == 0 for block in cached)
        need = config.blocks_for(len(seq.tokens)) - len(cached) + unheld
        # Whoever decodes beside it may want a block at the next step.
        headroom = len(running) + len(admitted)
        if budget == 0 or _seats(seq) > seats or need + headroom > free - pool.reserved:
            break
        chunk = min(len(seq.tokens) - len(cached) * config.block_size, budget)
        free, budget, seats = free - need, budget - chunk, seats - _seats(seq)
        admitted.append(seq)
        scheduled.append((seq, chunk))
    return admitted


def _seats(seq: Sequence) -> int:
    """A prompt that n choices share will soon be n sequences."""
    return 1 if seq.request.forked or seq.request.prefill_only else seq.request.n


def blocks_to_grow(seq: Sequence, chunk: int, ref_count: Callable[[int], int], config: EngineConfig) -> int:
    """New blocks that computing `chunk` more tokens takes, a copy of a shared block included."""
    need = config.blocks_for(seq.num_computed + chunk) - len(seq.block_table)
    return need + must_copy(seq, ref_count, config)


def must_copy(seq: Sequence, ref_count: Callable[[int], int], config: EngineConfig) -> bool:
    """Whether the block that the next token goes into is half full and shared (copy-on-write)."""
    block, offset = divmod(seq.num_computed, config.block_size)
    return offset > 0 and ref_count(seq.block_table[block]) > 1
