"""The loop of a worker: decide, apply, run, publish.

One thread runs `run_forever`. Everything else may be called from any thread: the lock guards the
books (sequences, blocks) and is never held while the device works, so admission and transfers do not
wait for a step. What a step in flight reads and writes is given back when it has landed, so that nothing
else can be written over.

With a runner that overlaps, step n + 1 is decided and launched before the tokens of step n are known, on
the assumption that no sequence ends with them; a sequence that did end has computed one row for nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

from pagewire_core import faults
from pagewire_core.block_hash import PageKeys
from pagewire_core.errors import ContextLength, InvalidRequest, PagewireError

from pagewire_engine.announced_blocks import AnnouncedBlocks
from pagewire_engine.batch import Batch
from pagewire_engine.block_manager import BlockManager
from pagewire_engine.books import Books
from pagewire_engine.composition import compose
from pagewire_engine.config import EngineConfig
from pagewire_engine.counters import Counters
from pagewire_engine.events import Started
from pagewire_engine.external_blocks import ExternalBlocks
from pagewire_engine.flight import Flight
from pagewire_engine.layer_stream import LayerStream
from pagewire_engine.masks import allowed_tokens
from pagewire_engine.model_runner import Runner
from pagewire_engine.outbox import Outbox, deliver_outbox
from pagewire_engine.proposer import Proposer, bounded
from pagewire_engine.publishing import Publisher
from pagewire_engine.sampler import Sampled
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.scheduler import Decision, Pool, Running, decide
from pagewire_engine.sequence import Request, Sequence
from pagewire_engine.step_cost import StepCost

_MAX_CHOICES = 1024  # of a prompt that is only computed here
_RECHECK = 32  # steps after which a sequence that was refused a place is looked up again


class Engine:
    """Continuous batching over one runner.

    deliver: hands events to their requests, `deliver_outbox` on a thread of its choice; called with the lock held, for
    what two threads have to say of a request comes in the order in which it came about. stored / removed: told the
    hashes of hash blocks that this engine's prefix cache gains and loses. proposer: guesses tokens for decoding
    sequences; with one, steps do not overlap.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        deliver: Callable[[Outbox], None] | None = None,
        stored: Callable[[Seq[bytes]], None] = lambda hashes: None,
        removed: Callable[[Seq[bytes]], None] = lambda hashes: None,
        proposer: Proposer | None = None,
    ) -> None:
        self.config = config
        self._deliver = deliver or deliver_outbox
        self.runner = runner
        self.counters = Counters()
        self.step_cost = StepCost(config.attention_work)
        self._announced = AnnouncedBlocks(stored, removed)
        cache = runner.cache
        self.blocks = BlockManager(
            config.num_blocks, removed=self._announced.lost, freed=cache.freed, allocated=cache.allocated
        )
        self._proposer = proposer
        self._books = Books(config, self.blocks, self._announced, proposer.ended if proposer else lambda seq: None)
        self._publisher = Publisher(self._books, self.counters)
        self.layers = LayerStream(runner)
        self._flights: deque[Flight] = deque()
        self._depth = 1 if runner.overlaps and not proposer else 0  # steps in flight while the next is composed
        self._landed_at = 0.0
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._stopping = False
        self.external = ExternalBlocks(self.blocks, config, self._lock, self._wake, self._wanted_before)

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ContextLength if it can never fit."""
        self.check_fits(len(request.prompt), request.n, request.prefill_only)
        prompt = self._sequence(request)
        with self._lock:
            request.sequences = [prompt]
            self._books.enqueue(prompt)
            self._wake.notify()

    def _sequence(self, request: Request, choice: int = 0, output: Seq[int] = (), num_computed: int = 0) -> Sequence:
        """The request's prompt and some output of it; its keys are computed here, not under the lock."""
        tokens, keys = [*request.prompt, *output], PageKeys(request.cache_root, self.config.block_size)
        self.check_ids(tokens)
        self.check_params(request.params)
        if self.config.enable_prefix_caching:
            keys.extend(tokens, len(tokens))
        return Sequence(request, choice, tokens, len(request.prompt), keys, num_computed)

    @contextlib.contextmanager
    def _released_if_refused(self, block_table: Seq[int]) -> Iterator[None]:
        try:
            yield
        except PagewireError:
            with self._lock:
                self.blocks.release(block_table)
                self._wake.notify()
            raise

    def check_ids(self, ids: Collection[int]) -> None:
        """Raises InvalidRequest for ids that are no tokens: a row of the embeddings that is not there."""
        if ids and max(ids) >= self.config.vocab_size:
            raise InvalidRequest(f"token ids must be below the vocabulary size, {self.config.vocab_size}")

    def check_params(self, params: SamplingParams) -> None:
        """Raises InvalidRequest for parameters that name what is no token."""
        for ids in (params.logit_bias, params.allowed_token_ids, params.logprob_token_ids, *params.bad_tokens):
            self.check_ids(ids)

    def check_fits(self, num_prompt: int, n: int, prefill_only: bool = False) -> None:
        """Raises ContextLength for what this engine can never hold. A prompt that decodes needs room for a token."""
        limit = min(self.config.max_model_len, self.config.num_blocks * self.config.block_size)
        if not num_prompt:
            raise ContextLength("the prompt is empty", "prompt")
        if num_prompt > limit or (num_prompt == limit and not prefill_only):
            raise ContextLength(f"the prompt has {num_prompt} tokens; this worker can hold {limit}", "prompt")
        if prefill_only and n > _MAX_CHOICES:
            raise ContextLength(f"n={n} is more than {_MAX_CHOICES}", "n")
        if not prefill_only and n > self.config.max_num_seqs:
            raise ContextLength(f"n={n} is more than --max-num-seqs {self.config.max_num_seqs}", "n")

    def start_transferred(self, request: Request, block_table: Seq[int], first: Seq[Sampled]) -> None:
        """Starts decoding a prompt whose KV is already in `block_table`.

        The references pass to the engine, which gives them back if it refuses the request.
        """
        outbox: Outbox = []
        with self._released_if_refused(block_table):
            prompt = self._sequence(request, num_computed=len(request.prompt))
        with self._lock:
            prompt.block_table = list(block_table)
            request.sequences = [prompt]
            self._books.register(prompt)
            if request.cancelled:
                self._books.drop(prompt)
            else:
                self._publisher.fork(prompt, first, outbox)
            self._deliver(outbox)
            self._wake.notify()

    def resume(self, request: Request, prior: Seq[Seq[int] | None], block_table: Seq[int] = ()) -> None:
        """Goes on after the output that each choice already has; None: it has ended.

        block_table: the prompt's KV, if it is here; the references pass to the engine, refused or not, whose prefix
        cache has it for the choices. What else they need is computed, as after a preemption.
        """
        with self._released_if_refused(block_table):
            choices = [self._sequence(request, i, output) for i, output in enumerate(prior) if output is not None]
            prompt = self._sequence(request, num_computed=len(request.prompt))
        with self._lock:
            request.sequences, request.forked = choices, True
            if block_table:
                prompt.block_table = list(block_table)
                self._books.register(prompt)
                self._books.drop(prompt)
            for seq in choices:
                if not request.cancelled:
                    self._books.enqueue(seq)
            self._wake.notify()

    def adopt(self, prompt: Seq[int], cache_root: bytes, block_table: Seq[int]) -> None:
        """The prefix cache gets a prompt whose KV is in `block_table`; the references pass as in `resume`."""
        request = Request("", list(prompt), cache_root, SamplingParams(), 1, lambda event: None)
        with self._released_if_refused(block_table):
            seq = self._sequence(request, num_computed=len(prompt))
        with self._lock:
            seq.block_table = list(block_table)
            self._books.register(seq)
            self._books.drop(seq)
            self._wake.notify()

    def cancel(self, request: Request, choices: Seq[int] = ()) -> None:
        """Ends some choices of a decoding request, or (choices empty) all of it. Idempotent."""
        outbox: Outbox = []
        with self._lock:
            if not choices:
                request.cancelled = True
                self.release(request)
            for seq in request.sequences:
                if not choices or (request.forked and seq.choice in choices):
                    self._books.drop(seq)
            self._publisher.finish_if_all_ended(request, outbox)
            self._deliver(outbox)
            self._wake.notify()

    def release(self, request: Request) -> None:
        """Gives back the prompt blocks of a prefill-only request that has its first tokens. Idempotent."""
        with self._lock:
            if request in self._books.holding:
                self._books.holding.discard(request)
                self._books.drop(request.sequences[0])

    def snapshot(self) -> list[bytes]:
        """Hash blocks in the prefix cache, parents before children."""
        with self._lock:
            return self._announced.hashes

    def reset_prefix_cache(self) -> int:
        """Forgets every cached block that nobody holds; how many those were."""
        with self._lock:
            num_cached = self.blocks.num_cached
            self.blocks.reset_cache()
            return num_cached

    def block_table(self, request: Request) -> list[int]:
        """Blocks of a prefill-only request's prompt; empty once they are given back."""
        with self._lock:
            return list(request.sequences[0].block_table)

    # ---------------------------------------------------------------- the loop

    def tell_layers(self) -> None:
        """Tells prompts that are to be sent how far the step in flight is; when `runner.progress` is readable."""
        with self._lock:  # before it lands, so that what it then says comes after this
            outbox = self.layers.news()
        deliver_outbox(outbox)

    def run_forever(self) -> None:
        """Steps until `stop`; sleeps while there is nothing to do."""
        while not self._stopping:
            with self._lock:
                if not (self._books.waiting or self._books.running or self._flights):
                    self._sleep()
                    continue
            if not self.step():
                with self._lock:  # work, but no room for it: wait until something is given back
                    self._sleep(timeout=0.05)
        self.runner.rest()

    def _sleep(self, timeout: float | None = None) -> None:
        if not self._stopping:
            self.runner.rest()
            self._wake.wait(timeout)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._wake.notify_all()

    def step(self) -> bool:
        """One turn of the loop; False if nothing could be scheduled and nothing was in flight."""
        proposed, began = self._propose(), time.perf_counter()
        with self._lock:
            others_run = bool(self._books.running)
            decision, preempted = self._decide(bounded(proposed, self.config.max_model_len))
            outbox, batch = self._apply(decision)
            self._deliver(outbox)
        self.counters.began(len(decision.admitted), others_run, time.perf_counter() - began)
        if batch:
            batch = self.layers.watched(self._masked(batch), self._books.launched)
            drafts = tuple(tuple(seq.draft) for seq in decision.drafted)
            self._flights.append(Flight.launch(self.runner, self._books.launched, batch, drafts))
        progress = bool(batch or self._flights or preempted)
        while len(self._flights) > (self._depth if batch else 0):
            self._land(self._flights.popleft())
        return progress

    def _propose(self) -> list[tuple[Sequence, list[int]]]:
        """Guesses for the sequences that decode; without the lock, for it may take as long as a small step."""
        if not self._proposer:
            return []
        with self._lock:
            sequences = list(self._books.rows.sequences)
        return list(zip(sequences, self._proposer.propose(sequences), strict=True)) if sequences else []

    def _decide(self, drafted: Seq[Sequence]) -> tuple[Decision, bool]:
        """The next step, and whether somebody was preempted for it."""
        decision, preempted = self._decide_once(drafted, self._books.waiting), False
        while decision.preempted:
            if self._flights:  # what they hold is in use: first see what the steps in flight free
                return Decision(), preempted
            for seq in decision.preempted:
                self._books.preempt(seq)
            self.counters.preemptions += len(decision.preempted)
            preempted = True
            decision = self._decide_once([seq for seq in drafted if seq.row >= 0], ())
        return decision, preempted

    def _decide_once(self, drafted: Seq[Sequence], waiting: Iterable[Sequence]) -> Decision:
        books = self._books
        running = Running(books.rows, books.rows.ready(books.landed), drafted, books.running, books.prompts)
        recheck = not books.running or self.counters.steps % _RECHECK == 0
        free, reserved = self.blocks.num_free, self.external.reserved
        pool = Pool(free, reserved, books.lookup, self.blocks.ref_count, recheck, self._claimed_before)
        return decide(running, waiting, pool, self.config, self._prefill_limit())

    def _claimed_before(self, seq: Sequence) -> int:
        """Blocks for those in the line who came before it."""
        return 0 if self._books.num_promised else sum(self.external.line.before(seq.request.arrived))

    def _wanted_before(self, when: float) -> int:
        """Blocks for the first in the queue, if it came before."""
        books = self._books
        return books.wanted_blocks if books.num_promised or books.first_arrived < when else 0

    def _prefill_limit(self) -> int | None:
        """Prompt tokens in a step with decoding sequences: whole blocks, at least one, so that prompts get on."""
        if not self.config.max_prefill_delay_ms:
            return None
        blocks = self.step_cost.prefill_tokens(self.config.max_prefill_delay_ms) // self.config.block_size
        return max(blocks, 1) * self.config.block_size

    def _apply(self, decision: Decision) -> tuple[Outbox, Batch | None]:
        """Binds the blocks that the decision needs and builds its batch."""
        outbox: Outbox = []
        copies = self._books.bind(decision)
        for seq, cached in ((admission.seq, admission.seq.num_computed) for admission in decision.admitted):
            if not seq.request.forked and not seq.num_preemptions:
                self.counters.prompt_tokens_cached += cached
                outbox.append((seq.request, Started(cached)))
        return outbox, compose(self._books, decision, copies)

    def _masked(self, batch: Batch) -> Batch:
        """The batch with the masks of the rows that have some. Requests whose grammars fail end."""
        if not any(row.params.masked for row in batch.sample_rows):
            return batch
        allowed = allowed_tokens(batch.sample_rows, self.runner.config.vocab_size)
        if any(row.matching and row.matching.error for row in batch.sample_rows):
            errors = {seq.request: seq.request.matchings.error for seq, _ in batch.scheduled if seq.request.matchings}
            with self._lock:
                self._deliver(self._publisher.fail({request: error for request, error in errors.items() if error}))
        return replace(batch, allowed=allowed)

    def _land(self, flight: Flight) -> None:
        """Waits for a step's tokens and publishes them."""
        sampled = flight.tokens()
        faults.point("step")
        now = time.perf_counter()
        milliseconds = (now - max(flight.started, self._landed_at)) * 1e3
        self._landed_at = now
        accepted = self.counters.accepted_tokens
        with self._lock:
            self._books.land(flight.number)
            self.layers.landed(flight.number)
            if isinstance(sampled, PagewireError):
                outbox = self._publisher.fail({seq.request: sampled for seq, _ in flight.batch.scheduled})
            else:
                outbox = self._publisher.publish(flight.batch, flight.drafts, sampled, flight.scores())
            self._deliver(outbox)
        num_tokens = flight.num_decode + sum(map(len, flight.drafts)), flight.num_prefill_tokens
        lost = isinstance(sampled, PagewireError)
        self.counters.took(milliseconds / 1e3, *num_tokens, time.perf_counter() - now, lost)
        self._observe(flight, self.counters.accepted_tokens - accepted, milliseconds)

    def _observe(self, flight: Flight, accepted: int, milliseconds: float) -> None:
        """Learns from how long a step took."""
        self.step_cost.add(flight.prefill_work, flight.decode_work, milliseconds)
        if self._proposer and not flight.num_prefill_tokens:
            num_drafts = sum(map(len, flight.drafts))
            self._proposer.observe(num_drafts, accepted, flight.num_decode, milliseconds)

    # ---------------------------------------------------------------- what others see

    def check(self) -> None:
        """Raises AssertionError if any block is lost, doubled or held by nobody we know."""
        with self._lock:
            self._books.check()
            self.blocks.check([*self._books.tables(), *self.external.tables])

    def max_running_tokens(self) -> int:
        """What the running sequences may grow to."""
        with self._lock:
            longest = (seq.num_prompt + seq.request.params.max_tokens for seq in self._books.running)
            return sum(min(tokens, self.config.max_model_len) for tokens in longest)

    def blocks_promised_away(self) -> int:
        """Blocks that the first that waits lacks because they are promised to transfers.

        Where there would be too few without promises, too, those that it will lack when all has ended that runs here.
        """
        with self._lock:
            wanted, reserved = self._books.wanted_blocks, self.external.reserved
            free = self.blocks.num_free - len(self._books.running)  # as the scheduler has them
            if wanted > free:
                free = self.blocks.num_blocks - self.external.num_held
            return max(wanted - max(free - reserved, 0), 0) if reserved else 0

    def load(self) -> dict[str, float]:
        """The numbers of WorkerService.Stats that the engine knows."""
        with self._lock:
            tokens, attended = self._books.prefill_work
            return {
                "free_blocks": max(self.blocks.num_free - self.external.reserved, 0),
                "total_blocks": self.blocks.num_blocks,
                "reserved_blocks": self.external.reserved,
                "num_running": len(self._books.running),
                "num_waiting": len(self._books.waiting),
                "waiting_prefill_tokens": tokens,
                "waiting_prefill_attended": attended,
                "cached_blocks": self.blocks.num_cached,
                "running_kv_tokens": self._books.num_kv_tokens,
                "max_num_seqs": self.config.max_num_seqs,
            }
