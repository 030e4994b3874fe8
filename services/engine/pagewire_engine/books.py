"""Every sequence of an engine, where it stands, and the blocks it holds. No policy, no device, no events.

    waiting --admit--> prompts --+--> rows (decode) --drop--> gone, or `ending` while a step is in flight
       ^                 |       +--> holding (prefill-only)
       +----preempt------+------------'

Steps are numbered in the order of their launches; those up to `landed` are done. Blocks that a step in flight
reads or writes are not given back before it has landed.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import numpy as np
from pagewire_core.block_hash import HASH_BLOCK

from pagewire_engine.announced_blocks import AnnouncedBlocks
from pagewire_engine.block_manager import BlockManager
from pagewire_engine.config import EngineConfig
from pagewire_engine.decode_rows import DecodeRows
from pagewire_engine.scheduler import Admission, Decision, must_copy
from pagewire_engine.seats import Seats
from pagewire_engine.sequence import Request, Sequence


class Books:
    """Changed under the engine's lock only. ended: told each sequence that will compute nothing more."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        announced: AnnouncedBlocks,
        ended: Callable[[Sequence], None] = lambda seq: None,
    ) -> None:
        self.config, self.blocks, self._announced, self._ended = config, blocks, announced, ended
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: dict[Sequence, None] = {}  # prompts and rows, in the order of their coming
        self.prompts: dict[Sequence, None] = {}
        self.rows = DecodeRows(config.max_num_seqs)
        self.holding: set[Request] = set()  # prefill-only requests whose blocks wait to be sent
        self.ending: dict[Sequence, None] = {}
        self.seats = Seats(config.max_num_seqs, config.blocks_for(config.max_model_len))
        self.launched = self.landed = 0
        self._late: deque[tuple[int, int]] = deque()  # (step, block): references to give back when it has landed
        self.num_promised = 0  # of the waiting prompts, those that another worker keeps room for
        self._waiting_work = (0, 0.0)  # of the waiting sequences

    # ---------------------------------------------------------------- coming

    def enqueue(self, seq: Sequence) -> None:
        seq.queued = True
        seq.expected_hit = len(self.lookup(seq)) * self.config.block_size
        self.waiting[seq] = None
        self._count_waiting(seq, 1)

    def lookup(self, seq: Sequence) -> list[int]:
        """Blocks of a waiting sequence's cached prefix; its last token is always computed, for its logits."""
        if not self.config.enable_prefix_caching:
            return []
        num_tokens = min(len(seq.tokens) - 1, seq.request.num_readable)
        return self.blocks.lookup(seq.keys.extend(seq.tokens, num_tokens))

    def admit(self, admitted: Seq[Admission]) -> None:
        for admission in admitted:  # all of them first: no prefix that was counted on is evicted for another
            for block in admission.cached:
                self.blocks.acquire(block)
        for admission in admitted:
            seq, cached = admission.seq, admission.cached
            self._leave_queue(seq)
            seq.block_table = cached + self.blocks.allocate(self.config.blocks_for(len(seq.tokens)) - len(cached))
            seq.num_computed = seq.num_scheduled = len(cached) * self.config.block_size
            seq.num_registered = len(cached)
            seq.seat = self.seats.take(seq.block_table)
            self.running[seq] = self.prompts[seq] = None

    def decode(self, seq: Sequence, next_id: int, *, shared: bool = False) -> None:
        """Gives a sequence whose known tokens are all computed, or will be by launched steps, a row."""
        position = len(seq.tokens) if next_id < 0 else len(seq.tokens) - 1
        params = seq.request.params
        if seq.seat < 0:
            seq.seat = self.seats.take(seq.block_table)
        self.prompts.pop(seq, None)
        self.running[seq] = None
        self.rows.join(seq, (
            seq.seat, next_id, position, len(seq.block_table) * self.config.block_size,
            min(seq.num_prompt + params.max_tokens, self.config.max_model_len), seq.last_step,
            params.needs_host_tokens, shared,
        ))  # fmt: skip

    def move_to_end(self, seq: Sequence) -> None:
        """It comes anew: of those that run now it would be the first to be preempted."""
        del self.running[seq]
        self.running[seq] = None

    def fork(self, prompt: Sequence) -> list[Sequence]:
        """A computed prompt as one sequence per choice, sharing its blocks. They run once `decode` is told."""
        request = prompt.request
        request.forked = True
        self.prompts.pop(prompt, None)
        self.running.pop(prompt, None)
        siblings = [prompt.fork(choice) for choice in range(1, request.n)]
        for sibling in siblings:
            for block in sibling.block_table:
                self.blocks.acquire(block)
        request.sequences = [prompt, *siblings]
        return request.sequences

    def hold(self, seq: Sequence) -> None:
        """The prompt of a prefill-only request is computed: it keeps its blocks and runs no more."""
        del self.running[seq], self.prompts[seq]
        self._stand_up(seq)
        self.holding.add(seq.request)

    # ---------------------------------------------------------------- a step

    def bind(self, decision: Decision) -> list[tuple[int, int]]:
        """Binds the blocks that a decision takes; returns the copies to make, (source, destination)."""
        self.admit(decision.admitted)
        copies: list[tuple[int, int]] = []
        for seq in decision.copying:
            self._copy_shared(seq, copies)
        for seq, block in zip(decision.growing, self.blocks.allocate(len(decision.growing)), strict=True):
            self._append_blocks(seq, [block])
        for seq in decision.drafted:
            self._copy_shared(seq, copies)
            need = self.config.blocks_for(len(seq.tokens) + len(seq.draft)) - len(seq.block_table)
            self._append_blocks(seq, self.blocks.allocate(max(need, 0)))
        if decision.refused:
            decision.refused[0].wanted_blocks = decision.refused[1]
        return copies

    def preempt(self, seq: Sequence) -> None:
        """Takes its blocks; it waits at the head of the queue."""
        assert not self.in_flight(seq) and not seq.request.prefill_only
        self._leave_running(seq)
        self._give_back(seq)
        seq.num_computed = seq.num_scheduled = seq.num_registered = seq.wanted_blocks = 0
        seq.num_preemptions += 1
        self.enqueue(seq)
        self.waiting.move_to_end(seq, last=False)

    def _copy_shared(self, seq: Sequence, copies: list[tuple[int, int]]) -> None:
        if not must_copy(seq, self.blocks.ref_count, self.config):
            return
        index = seq.num_computed // self.config.block_size
        [copy] = self.blocks.allocate(1)
        copies.append((seq.block_table[index], copy))
        self._late.append((self.launched + 1, seq.block_table[index]))  # the step reads it, whoever else gives it back
        seq.block_table[index] = copy
        self.seats.put(seq.seat, index, [copy])

    def _append_blocks(self, seq: Sequence, blocks: list[int]) -> None:
        if blocks:
            self.seats.put(seq.seat, len(seq.block_table), blocks)
            seq.block_table += blocks
            self.rows.capacities[seq.row] = len(seq.block_table) * self.config.block_size

    def in_flight(self, seq: Sequence) -> bool:
        """Whether a step with it has been launched and has not landed."""
        return bool((self.rows.last_steps[seq.row] if seq.row >= 0 else seq.last_step) > self.landed)

    def register(self, seq: Sequence) -> None:
        """Makes the sequence's newly full blocks findable; one that another block equals gives way to it.

        Not so a prefill-only request's: its KV is read by a transfer, beside the steps, from the first tokens on.
        """
        if not self.config.enable_prefix_caching:
            return
        keys = seq.keys.extend(seq.tokens, seq.num_computed)
        for index in range(seq.num_registered, len(keys)):
            block = seq.block_table[index]
            if seq.request.prefill_only and self.blocks.lookup([keys[index]]):
                continue
            known = self._register_block(block, keys[index])
            if known != block:
                seq.block_table[index] = known
                if seq.seat >= 0:
                    self.seats.put(seq.seat, index, [known])
        per_hash = HASH_BLOCK // self.config.block_size
        ends = range(seq.num_registered // per_hash * per_hash + per_hash - 1, len(keys), per_hash)
        seq.num_registered = len(keys)
        if ends:
            self._announced.gained([keys[index] for index in ends])

    def _register_block(self, block: int, key: bytes) -> int:
        """As BlockManager.register, but a block that a step in flight may read is not given back before it landed."""
        if self.launched == self.landed:
            return self.blocks.register(block, key)
        self.blocks.acquire(block)
        known = self.blocks.register(block, key)
        if known == block:
            self.blocks.release([block])
        else:
            self._late.append((self.launched, block))
        return known

    # ---------------------------------------------------------------- going

    def drop(self, seq: Sequence) -> None:
        """Ends a sequence wherever it is; its blocks go back, once no step in flight has it. Idempotent."""
        if not seq.finished:
            seq.finished = True
            self._ended(seq)
        flying = self.in_flight(seq)
        if seq in self.running:
            self._leave_running(seq)
        elif seq in self.waiting:
            self._leave_queue(seq)
        if flying:
            self.ending[seq] = None
        else:
            self.ending.pop(seq, None)
            self._give_back(seq)

    def land(self, step: int) -> None:
        """The results of `step` are there: what only it kept is given back."""
        self.landed = step
        while self._late and self._late[0][0] <= step:
            self.blocks.release([self._late.popleft()[1]])

    def settle(self, seq: Sequence) -> None:
        """Gives back what a finished sequence held for a step that has landed."""
        if seq in self.ending and not self.in_flight(seq):
            del self.ending[seq]
            self._give_back(seq)

    def _leave_running(self, seq: Sequence) -> None:
        del self.running[seq]
        self.prompts.pop(seq, None)
        if seq.row >= 0:
            self.rows.leave(seq)

    def _leave_queue(self, seq: Sequence) -> None:
        del self.waiting[seq]
        self._count_waiting(seq, -1)

    def _count_waiting(self, seq: Sequence, sign: int) -> None:
        self.num_promised += sign * seq.request.prefill_only
        tokens, attended = _work(len(seq.tokens), seq.expected_hit)
        self._waiting_work = (self._waiting_work[0] + sign * tokens, self._waiting_work[1] + sign * attended)

    def _give_back(self, seq: Sequence) -> None:
        self.blocks.release(seq.block_table)
        seq.block_table = []
        self._stand_up(seq)

    def _stand_up(self, seq: Sequence) -> None:
        if seq.seat >= 0:
            self.seats.leave(seq.seat)
            seq.seat = -1

    # ---------------------------------------------------------------- what others see

    @property
    def wanted_blocks(self) -> int:
        """Free blocks that the first that waits will take, if it found too few; else 0."""
        return next(iter(self.waiting)).wanted_blocks if self.waiting else 0

    @property
    def first_arrived(self) -> float:
        """When the first that waits arrived."""
        return next(iter(self.waiting)).request.arrived if self.waiting else math.inf

    @property
    def prefill_work(self) -> tuple[int, float]:
        """Tokens of prompts still to be computed, and what they attend to; of waiting ones, as they came."""
        work = [_work(len(seq.tokens), seq.num_scheduled) for seq in self.prompts]
        tokens, attended = self._waiting_work
        return tokens + sum(n for n, _ in work), attended + sum(a for _, a in work)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV the running sequences hold, or will when the launched steps are done."""
        return int(np.sum(self.rows.positions[: len(self.rows)])) + sum(seq.num_scheduled for seq in self.prompts)

    def tables(self) -> Iterator[Seq[int]]:
        """Every block table, for `BlockManager.check`."""
        for seq in (*self.running, *self.waiting, *self.ending):
            yield seq.block_table
        for request in self.holding:
            yield request.sequences[0].block_table
        yield [block for _, block in self._late]

    def check(self) -> None:
        """Raises AssertionError unless seats, rows and their copies of the blocks agree with the sequences."""
        seated = [seq for seq in (*self.running, *self.ending) if seq.seat >= 0]
        assert len({seq.seat for seq in seated}) == len(seated) == self.seats.num_taken, "seats disagree"
        for seq in seated:
            assert list(self.seats.tables[seq.seat, : len(seq.block_table)]) == seq.block_table, "a table disagrees"
        assert [seq.row for seq in self.rows.sequences] == list(range(len(self.rows)))
        assert {*self.prompts, *self.rows.sequences} == self.running.keys(), "a running sequence is nowhere"
        assert self.rows.num_queued == sum(seq.queued for seq in self.rows.sequences)
        for seq in self.rows.sequences:
            assert self.rows.seats[seq.row] == seq.seat
            assert self.rows.capacities[seq.row] == len(seq.block_table) * self.config.block_size
            if not self.in_flight(seq):
                assert self.rows.positions[seq.row] == seq.num_computed == len(seq.tokens) - 1
                assert self.rows.next_ids[seq.row] == seq.tokens[-1]


def _work(end: int, start: int) -> tuple[int, float]:
    """Tokens from start to end, and the tokens that each of them attends to, added up."""
    return end - start, (end - start) * (end + start) / 2
