"""The loop of a worker: decide, apply, run, publish.

One thread runs `run_forever`. Everything else may be called from any thread: the lock guards the
books (sequences, blocks) and is never held while the device works, so admission and transfers do not
wait for a step. A sequence in the step that is running is only marked when it is cancelled; its blocks
are given back after the step, so that nothing else can be written over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import structlog
from pagewire.v1 import common_pb2 as pb
from pagewire_core.block_hash import HASH_BLOCK, PageKeys
from pagewire_core.errors import ContextLength, Internal, PagewireError

from pagewire_engine.batch import Batch, build_batch
from pagewire_engine.block_manager import BlockManager
from pagewire_engine.config import EngineConfig
from pagewire_engine.events import Event, Failed, Finished, FirstTokens, Progress, Started, Token
from pagewire_engine.external_blocks import ExternalBlocks
from pagewire_engine.model_runner import ModelRunner
from pagewire_engine.sampler import Sampled
from pagewire_engine.scheduler import Decision, Pool, decide, must_copy
from pagewire_engine.sequence import Request, Sequence
from pagewire_engine.step_cost import StepCost

log = structlog.get_logger(__name__)

Outbox = list[tuple[Request, Event]]


@dataclass
class Counters:
    """Totals since start, for metrics and for proof."""

    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    tokens_sampled: int = 0
    preemptions: int = 0
    steps: int = 0


class Engine:
    """Continuous batching over one model runner.

    deliver: hands a step's events to their requests, `deliver_outbox` on a thread of its choice; called
    without the lock held. stored / removed: told the hashes of hash blocks that this engine's prefix cache gains and
    loses.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        *,
        deliver: Callable[[Outbox], None] | None = None,
        stored: Callable[[Seq[bytes]], None] = lambda hashes: None,
        removed: Callable[[Seq[bytes]], None] = lambda hashes: None,
    ) -> None:
        self.config = config
        self._deliver = deliver or deliver_outbox
        self.runner = runner
        self.counters = Counters()
        self.step_cost = StepCost()
        self.blocks = BlockManager(config.num_blocks, removed=self._on_removed, freed=runner.cache.freed)
        self._stored, self._removed = stored, removed
        self._published: dict[bytes, None] = {}  # hash blocks that peers were told of, parents first
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._holding: set[Request] = set()  # prefill-only requests whose blocks wait to be sent
        self._in_step: frozenset[Sequence] = frozenset()
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._stopping = False
        self.external = ExternalBlocks(self.blocks, config, self._lock, self._wake)

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ContextLength if it can never fit."""
        self.check_fits(len(request.prompt), request.n, request.prefill_only)
        with self._lock:
            keys = PageKeys(request.cache_root, self.config.block_size)
            prompt = Sequence(request, 0, list(request.prompt), len(request.prompt), keys)
            request.sequences = [prompt]
            self._waiting.append(prompt)
            self._wake.notify()

    def check_fits(self, num_prompt: int, n: int, prefill_only: bool = False) -> None:
        """Raises ContextLength for what this engine can never hold. A prompt that decodes needs room for a token."""
        limit = min(self.config.max_model_len, self.config.num_blocks * self.config.block_size)
        if not num_prompt:
            raise ContextLength("the prompt is empty", "prompt")
        if num_prompt > limit or (num_prompt == limit and not prefill_only):
            raise ContextLength(f"the prompt has {num_prompt} tokens; this worker can hold {limit}", "prompt")
        if not prefill_only and n > self.config.max_num_seqs:
            raise ContextLength(f"n={n} is more than --max-num-seqs {self.config.max_num_seqs}", "n")

    def start_transferred(self, request: Request, block_table: Seq[int], first: Seq[Sampled]) -> None:
        """Starts decoding a prompt whose KV is already in `block_table`; the references pass to the engine."""
        outbox: Outbox = []
        with self._lock:
            keys = PageKeys(request.cache_root, self.config.block_size)
            num_prompt = len(request.prompt)
            prompt = Sequence(request, 0, list(request.prompt), num_prompt, keys, num_computed=num_prompt)
            prompt.block_table = list(block_table)
            request.sequences = [prompt]
            self._register(prompt)
            if request.cancelled:
                self._drop(prompt)
            else:
                self._running += self._fork(prompt, first, outbox)
            self._wake.notify()
        self._deliver(outbox)

    def cancel(self, request: Request, choices: Seq[int] = ()) -> None:
        """Ends some choices of a decoding request, or (choices empty) all of it. Idempotent."""
        outbox: Outbox = []
        with self._lock:
            if not choices:
                request.cancelled = True
                self.release(request)
            for seq in request.sequences:
                if not choices or (request.forked and seq.choice in choices):
                    seq.finished = True
                    if seq not in self._in_step:
                        self._drop(seq)
            self._finish_if_all_ended(request, outbox)
            self._wake.notify()
        self._deliver(outbox)

    def release(self, request: Request) -> None:
        """Gives back the prompt blocks of a prefill-only request that has its first tokens. Idempotent."""
        with self._lock:
            if request in self._holding:
                self._holding.discard(request)
                self._drop(request.sequences[0])

    def snapshot(self) -> list[bytes]:
        """Hash blocks in the prefix cache, parents before children."""
        with self._lock:
            return list(self._published)

    def block_table(self, request: Request) -> list[int]:
        """Blocks of a prefill-only request's prompt; empty once they are given back."""
        with self._lock:
            return list(request.sequences[0].block_table)

    # ---------------------------------------------------------------- the loop

    def run_forever(self) -> None:
        """Steps until `stop`; sleeps while there is nothing to do."""
        while True:
            with self._lock:
                while not (self._stopping or self._waiting or self._running):
                    self._wake.wait()
                if self._stopping:
                    return
            if not self.step():
                with self._lock:  # work, but no room for it: wait until something is given back
                    self._wake.wait(timeout=0.05)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._wake.notify_all()

    def step(self) -> bool:
        """One turn of the loop; False if nothing could be scheduled."""
        with self._lock:
            pool = Pool(self.blocks.num_free, self.external.reserved, self._lookup, self.blocks.ref_count)
            decision = decide(self._running, self._waiting, pool, self.config)
            outbox, batch = self._apply(decision)
            self._in_step = frozenset(seq for seq, _ in batch.scheduled) if batch else frozenset()
        self._deliver(outbox)
        if batch is None:
            return bool(decision.preempted)
        started = time.perf_counter()
        sampled: list[Sampled] | PagewireError
        try:
            sampled = self.runner.run(batch)
        except Exception as error:  # the step is lost, not the worker: its requests fail, the others go on
            log.exception("step failed")
            sampled = Internal(f"a step of the engine failed: {type(error).__name__}")
        milliseconds = (time.perf_counter() - started) * 1e3
        with self._lock:
            outbox = self._fail_step(batch, sampled) if isinstance(sampled, PagewireError) else (
                self._publish(batch, sampled)
            )  # fmt: skip
            self._in_step = frozenset()
            self.counters.steps += 1
            num_prefill = sum(chunk for _, chunk in batch.scheduled if chunk > 1)
            self.step_cost.add(num_prefill, batch.num_decode, milliseconds)
        self._deliver(outbox)
        return True

    def _lookup(self, seq: Sequence) -> list[int]:
        """Blocks of a waiting sequence's cached prefix; its last token is always computed, for its logits."""
        if not self.config.enable_prefix_caching:
            return []
        return self.blocks.lookup(seq.keys.extend(seq.tokens, len(seq.tokens) - 1))

    def _apply(self, decision: Decision) -> tuple[Outbox, Batch | None]:
        """Binds the blocks that the decision needs and builds its batch."""
        outbox: Outbox = []
        for seq in decision.preempted:
            self._preempt(seq)
        for seq in decision.admitted:
            self._admit(seq, outbox)
        copies: list[tuple[int, int]] = []
        for seq, chunk in decision.scheduled:
            self._grow(seq, chunk, copies)
        if not decision.scheduled:
            return outbox, None
        device = self.runner.model.config.device
        return outbox, build_batch(decision.scheduled, self.config.block_size, copies, device)

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self.blocks.release(seq.block_table)
        seq.block_table, seq.num_computed, seq.num_registered = [], 0, 0
        seq.num_preemptions += 1
        self.counters.preemptions += 1
        self._waiting.appendleft(seq)

    def _admit(self, seq: Sequence, outbox: Outbox) -> None:
        self._waiting.remove(seq)
        cached = self._lookup(seq)
        for block in cached:
            self.blocks.acquire(block)
        seq.block_table = cached + self.blocks.allocate(self.config.blocks_for(len(seq.tokens)) - len(cached))
        seq.num_computed = len(cached) * self.config.block_size
        seq.num_registered = len(cached)
        self._running.append(seq)
        if not seq.request.forked and not seq.num_preemptions:
            self.counters.prompt_tokens_cached += seq.num_computed
            outbox.append((seq.request, Started(seq.num_computed)))

    def _grow(self, seq: Sequence, chunk: int, copies: list[tuple[int, int]]) -> None:
        if must_copy(seq, self.blocks.ref_count, self.config):
            index = seq.num_computed // self.config.block_size
            [copy] = self.blocks.allocate(1)
            copies.append((seq.block_table[index], copy))
            self.blocks.release([seq.block_table[index]])
            seq.block_table[index] = copy
        need = self.config.blocks_for(seq.num_computed + chunk) - len(seq.block_table)
        seq.block_table += self.blocks.allocate(max(need, 0))

    # ---------------------------------------------------------------- after a step

    def _publish(self, batch: Batch, sampled: list[Sampled]) -> Outbox:
        """Books what the step computed and says so to the requests."""
        outbox: Outbox = []
        tokens = iter(sampled)
        for seq, chunk in batch.scheduled:
            if seq.num_computed < seq.num_prompt:
                self.counters.prompt_tokens_computed += min(chunk, seq.num_prompt - seq.num_computed)
            seq.num_computed += chunk
            complete = seq.num_computed == len(seq.tokens)
            chosen = [next(tokens) for _ in seq.request.choices_to_sample(seq)] if complete else []
            self._register(seq)
            if seq.finished:
                self._drop(seq)
            elif seq.request.prefill_only:
                self._publish_prefill(seq, chosen, outbox)
            elif chosen and not seq.request.forked:
                self._running.remove(seq)
                self._running += self._fork(seq, chosen, outbox)
            elif chosen:
                self._append(seq, chosen[0], outbox)
        return outbox

    def _publish_prefill(self, seq: Sequence, chosen: list[Sampled], outbox: Outbox) -> None:
        outbox.append((seq.request, Progress(seq.num_computed)))
        if chosen:
            self.counters.tokens_sampled += len(chosen)
            outbox.append((seq.request, FirstTokens(tuple(chosen))))
            self._running.remove(seq)
            self._holding.add(seq.request)

    def _fork(self, prompt: Sequence, first: Seq[Sampled], outbox: Outbox) -> list[Sequence]:
        """Turns a computed prompt into one sequence per choice, sharing its blocks; returns the live ones."""
        request = prompt.request
        request.forked = True
        siblings = [prompt.fork(choice) for choice in range(1, request.n)]
        for sibling in siblings:
            for block in sibling.block_table:
                self.blocks.acquire(block)
        request.sequences = [prompt, *siblings]
        for seq, sampled in zip(list(request.sequences), first, strict=True):
            self._append(seq, sampled, outbox)
        return [seq for seq in (prompt, *siblings) if not seq.finished]

    def _append(self, seq: Sequence, sampled: Sampled, outbox: Outbox) -> None:
        """One more token; ends the sequence if that was its last."""
        seq.tokens.append(sampled.token)
        self.counters.tokens_sampled += 1
        end = seq.request.params.finish(sampled.token, seq.num_output)
        if end is None and len(seq.tokens) >= self.config.max_model_len:
            end = pb.FINISH_REASON_LENGTH, None
        reason, stop_token = end or (None, None)
        outbox.append((seq.request, Token(seq.choice, sampled, reason, stop_token)))
        if end:
            self._drop(seq)
            self._finish_if_all_ended(seq.request, outbox)

    def _finish_if_all_ended(self, request: Request, outbox: Outbox) -> None:
        if request.forked and not request.done and all(seq.finished for seq in request.sequences):
            request.done = True
            outbox.append((request, Finished(sum(seq.num_preemptions for seq in request.sequences))))

    def _register(self, seq: Sequence) -> None:
        """Makes the sequence's newly full blocks findable."""
        if not self.config.enable_prefix_caching:
            return
        keys = seq.keys.extend(seq.tokens, seq.num_computed)
        stored = []
        for index in range(seq.num_registered, len(keys)):
            seq.block_table[index] = self.blocks.register(seq.block_table[index], keys[index])
            if (index + 1) * self.config.block_size % HASH_BLOCK == 0 and keys[index] not in self._published:
                self._published[keys[index]] = None
                stored.append(keys[index])
        seq.num_registered = len(keys)
        if stored:
            self._stored(stored)

    def _on_removed(self, key: bytes) -> None:
        if key in self._published:
            del self._published[key]
            self._removed([key])

    def _drop(self, seq: Sequence) -> None:
        """Takes a sequence out of wherever it is and gives its blocks back. Idempotent."""
        seq.finished = True
        if seq in self._running:
            self._running.remove(seq)
        elif seq in self._waiting:
            self._waiting.remove(seq)
        self.blocks.release(seq.block_table)
        seq.block_table = []

    def _fail_step(self, batch: Batch, error: PagewireError) -> Outbox:
        failed = {seq.request for seq, _ in batch.scheduled}
        for request in failed:
            for seq in request.sequences:
                self._drop(seq)
        return [(request, Failed(error)) for request in failed if not request.cancelled]

    # ---------------------------------------------------------------- what others see

    def check(self) -> None:
        """Raises AssertionError if any block is lost, doubled or held by nobody we know."""
        with self._lock:
            tables = [seq.block_table for seq in (*self._running, *self._waiting)]
            tables += [request.sequences[0].block_table for request in self._holding]
            self.blocks.check([*tables, *self.external.tables])

    def load(self) -> dict[str, int]:
        """The numbers of WorkerService.Stats that the engine knows."""
        with self._lock:
            return {
                "free_blocks": max(self.blocks.num_free - self.external.reserved, 0),
                "total_blocks": self.blocks.num_blocks,
                "reserved_blocks": self.external.reserved,
                "num_running": len(self._running),
                "num_waiting": len(self._waiting),
                "waiting_prefill_tokens": sum(s.num_uncomputed for s in (*self._waiting, *self._running)
                                              if s.num_uncomputed > 1),
                "running_kv_tokens": sum(s.num_computed for s in self._running),
                "max_num_seqs": self.config.max_num_seqs,
            }  # fmt: skip


def deliver_outbox(outbox: Outbox) -> None:
    """Emits each event, unless its request was cancelled meanwhile."""
    for request, event in outbox:
        if not request.cancelled:
            request.emit(event)
