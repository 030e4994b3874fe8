"""Decides what the next step computes. Pure: it reads the state it is given and changes nothing.

Policy, as in Sarathi-Serve (arXiv 2403.02310) and vLLM: every running sequence that decodes gets its token, or, where
they are more than the token budget, those that have waited longest; what they and their drafts leave of the budget, a
block at least, goes to prompts that are partly computed, then to waiting ones, in order of arrival, as long as the
prompts' tokens are fewer than make a step efficient. When a decoding sequence finds no block, the sequence that arrived
last is preempted: it gives its blocks back and is computed anew later (mostly from the prefix cache). Not so a
prefill-only prompt: its KV may be on its way to another worker, and with all the blocks that it will ever need it ends
by itself.

`max_num_seqs` sequences that have waited run at a time. Those whose KV came from a prefill worker run beside them, at
once, for their blocks are theirs already: as many as the router lets in. If they took the places of those that wait, a
stream of them would keep these waiting for ever.

The cost is that of the sequences that change: those that only go on by a token are counted, not visited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from pagewire_engine.config import EngineConfig
from pagewire_engine.decode_rows import DecodeRows
from pagewire_engine.sequence import Sequence


@dataclass(frozen=True)
class Running:
    """What a decision must know of the running sequences.

    rows: those that decode. ready: indices of the rows that may go on. drafted: of these, the sequences that
    carry draft tokens. order: all that run, in the order of their coming; prompts: those that do not decode yet.
    """

    rows: DecodeRows
    ready: np.ndarray
    drafted: Seq[Sequence]
    order: dict[Sequence, None]
    prompts: Iterable[Sequence]


@dataclass(frozen=True)
class Pool:
    """What a decision must know of the blocks.

    free: blocks that can be allocated; reserved: of these, promised to transfers, not for new
    sequences. lookup: blocks of a sequence's cached prefix. ref_count: holders of a block. recheck: a sequence
    that was refused a place is looked up again although no more blocks are free than it wanted then. claimed: blocks
    for transfers that have waited for them longer than the sequence has for its place.
    """

    free: int
    reserved: int
    lookup: Callable[[Sequence], list[int]]
    ref_count: Callable[[int], int]
    recheck: bool = True
    claimed: Callable[[Sequence], int] = lambda seq: 0


@dataclass(frozen=True)
class Admission:
    """A waiting sequence that joins: blocks of its cached prefix, and the tokens it computes in this step."""

    seq: Sequence
    cached: list[int]
    chunk: int


@dataclass(frozen=True, eq=False)
class Decision:
    """One step, or who must go before there can be one.

    preempted go back to waiting: nothing else is decided then, and nobody may join in that step. decode: rows that
    compute one token, of which `growing` need a block and `copying` a copy of a shared one. drafted: sequences that
    compute 1 + len(draft) tokens. chunks: prompts and the tokens of them. refused: the first that waits and found
    too few blocks, and how many it would have taken.
    """

    preempted: tuple[Sequence, ...] = ()
    decode: np.ndarray = field(default_factory=lambda: np.arange(0))
    growing: tuple[Sequence, ...] = ()
    copying: tuple[Sequence, ...] = ()
    drafted: tuple[Sequence, ...] = ()
    chunks: tuple[tuple[Sequence, int], ...] = ()
    admitted: tuple[Admission, ...] = ()
    refused: tuple[Sequence, int] | None = None


def decide(
    running: Running, waiting: Iterable[Sequence], pool: Pool, config: EngineConfig, prefill_limit: int | None = None
) -> Decision:
    """waiting in order of arrival. prefill_limit: prompt tokens in a step that has decoding sequences."""
    rows, ready, seats = running.rows, running.ready, _free_seats(running, config)
    share = _prompts_share(running, waiting, seats, config)
    most = config.max_num_batched_tokens - share
    if len(ready) > most:  # they take turns
        longest = np.argsort(rows.last_steps[ready], kind="stable")[:most]
        ready = np.sort(ready[longest])
    growing = [rows.sequences[i] for i in ready[rows.positions[ready] >= rows.capacities[ready]]]
    fresh = (rows.sequences[i] for i in ready[rows.may_copy[ready] > 0])
    copying = [seq for seq in fresh if must_copy(seq, pool.ref_count, config)]
    if len(growing) + len(copying) > pool.free:
        return _preempt(running, ready, pool, config)
    free = pool.free - len(growing) - len(copying)
    drafted, free, left = _drafts(running, ready, free - pool.reserved, free, most - len(ready), config)
    budget = left + share
    limit = budget if prefill_limit is None or not len(ready) else min(budget, prefill_limit)
    chunks, left = _chunks(running.prompts, limit)
    least = max(limit - config.enough_prompt_tokens, 0)
    admitted, refused = _admit(running, waiting, seats, pool, config, free, left, least)
    if drafted:
        single = np.ones(len(rows), bool)
        single[[seq.row for seq in drafted]] = False
        ready = ready[single[ready]]
        growing = [seq for seq in growing if single[seq.row]]
        copying = [seq for seq in copying if single[seq.row]]
    return Decision((), ready, tuple(growing), tuple(copying), tuple(drafted), tuple(chunks), tuple(admitted), refused)


def _free_seats(running: Running, config: EngineConfig) -> int:
    return config.max_num_seqs - running.rows.num_queued - sum(_seats(seq) for seq in running.prompts)


def _prompts_share(running: Running, waiting: Iterable[Sequence], seats: int, config: EngineConfig) -> int:
    """Tokens of the budget that rows and their drafts leave to prompts, which would else wait until answers end."""
    first = next(iter(waiting), None)
    if not any(running.prompts) and (first is None or _seats(first) > seats):
        return 0
    return min(config.block_size, config.max_num_batched_tokens // 2)


def _drafts(
    running: Running, ready: np.ndarray, spare: int, free: int, budget: int, config: EngineConfig
) -> tuple[list[Sequence], int, int]:
    """Those whose draft fits the budget and the blocks that nobody was promised; nobody is preempted for a guess."""
    drafted: list[Sequence] = []
    chosen = set(ready.tolist()) if running.drafted else set()
    for seq in running.drafted:
        position = int(running.rows.positions[seq.row])
        held = max(len(seq.block_table), config.blocks_for(position + 1))
        need = max(config.blocks_for(position + 1 + len(seq.draft)) - held, 0)
        if need <= spare and len(seq.draft) <= budget and seq.row in chosen:
            spare, free, budget = spare - need, free - need, budget - len(seq.draft)
            drafted.append(seq)
    return drafted, free, budget


def _chunks(prompts: Iterable[Sequence], limit: int) -> tuple[list[tuple[Sequence, int]], int]:
    chunks: list[tuple[Sequence, int]] = []
    for seq in prompts:
        if not limit:
            break
        if chunk := min(len(seq.tokens) - seq.num_scheduled, limit):
            chunks.append((seq, chunk))
            limit -= chunk
    return chunks, limit


def _admit(
    running: Running,
    waiting: Iterable[Sequence],
    seats: int,
    pool: Pool,
    config: EngineConfig,
    free: int,
    limit: int,
    least: int,
) -> tuple[list[Admission], tuple[Sequence, int] | None]:
    """Takes sequences from the head of the queue while they fit and more than `least` of the limit is left."""
    admitted: list[Admission] = []
    for seq in waiting:
        # Whoever decodes beside it may want a block at the next step.
        available = free - pool.reserved - pool.claimed(seq) - len(running.order) - len(admitted)
        if limit <= least or _seats(seq) > seats or (seq.wanted_blocks > available and not pool.recheck):
            break
        cached = pool.lookup(seq)
        unheld = sum(pool.ref_count(block) == 0 for block in cached)
        need = config.blocks_for(len(seq.tokens)) - len(cached) + unheld
        if need > available:
            return admitted, (seq, need)
        chunk = min(len(seq.tokens) - len(cached) * config.block_size, limit)
        free, limit, seats = free - need, limit - chunk, seats - _seats(seq)
        admitted.append(Admission(seq, cached, chunk))
    return admitted, None


def _preempt(running: Running, ready: np.ndarray, pool: Pool, config: EngineConfig) -> Decision:
    """Takes the blocks of those that came last until the others can go on."""
    chosen, free = set(ready.tolist()), pool.free
    preempted: dict[Sequence, None] = {}
    victims = (seq for seq in reversed(running.order) if not seq.request.prefill_only)
    for seq in [seq for seq in running.order if seq.row in chosen]:
        need = int(running.rows.positions[seq.row] >= running.rows.capacities[seq.row])
        need += must_copy(seq, pool.ref_count, config)
        while need > free and seq not in preempted:
            victim = next(victims)
            preempted[victim] = None
            free += sum(pool.ref_count(block) == 1 for block in victim.block_table)
        free -= 0 if seq in preempted else need
    return Decision(tuple(preempted))


def _seats(seq: Sequence) -> int:
    """A prompt that n choices share will soon be n sequences."""
    return 1 if seq.request.forked or seq.request.prefill_only else seq.request.n


def must_copy(seq: Sequence, ref_count: Callable[[int], int], config: EngineConfig) -> bool:
    """Whether the block that the next token goes into is half full and shared (copy-on-write)."""
    block, offset = divmod(seq.num_computed, config.block_size)
    return offset > 0 and ref_count(seq.block_table[block]) > 1
