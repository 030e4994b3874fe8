"""A simulated worker: an engine's loop of steps that take predicted time, and the reports a real worker sends.

Batches as the engine does (continuous batching, prompts in chunks, at most --max-prefill-delay-ms of them beside
decoding sequences) and learns its own step costs with the engine's own code. Its costs have noise; what the router
knows of it is what it reports.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pagewire.v1 import common_pb2, worker_pb2
from pagewire_core.block_hash import HASH_BLOCK
from pagewire_core.prefix_index import PrefixIndex
from pagewire_engine.step_cost import StepCost
from pagewire_router.ledger import Ledger
from pagewire_router.load import StepModel

from pagewire_bench.simulator.clock import Clock
from pagewire_bench.simulator.prefix_cache import PrefixCache
from pagewire_bench.simulator.traces import Arrival

FINGERPRINT = b"f" * 32
_CHUNK = 2048
_PREFILL_DELAY_MS = 50.0
_REPORT_EVERY_S, _REPORT_TAKES_S = 0.1, 0.005
_EVENTS_TAKE_S = 0.1  # until the index has heard of a block
_LEARN_EVERY = 8  # steps, once it knows something: only to save the simulation's time
_NOISE = 0.05
_ATTENTION_WORK = 3e-5  # a model of 30 B parameters: 4 * 60 layers * 7168 FLOPs of 6e10


@dataclass(eq=False)
class Prompt:
    """A prompt on one worker. `started` when it joins a step, `computed` with its first token."""

    arrival: Arrival
    computed: Callable[[], None]
    started: Callable[[], None] = lambda: None
    blocks: int = 0
    done: int = 0  # tokens computed or found
    hit: int = 0  # blocks

    @property
    def rest(self) -> int:
        return len(self.arrival.prompt) - self.done


@dataclass(order=True)
class Decoding:
    """A sequence that decodes; `finish` is the number of the step with its last token."""

    finish: int
    number: int
    arrival: Arrival = field(compare=False)
    finished: Callable[[], None] = field(compare=False)


class SimWorker(Ledger):
    def __init__(
        self,
        name: str,
        role: common_pb2.WorkerRole,
        model: StepModel,
        hardware: Hardware,
        clock: Clock,
        index: PrefixIndex,
        seed: int,
    ) -> None:
        super().__init__(
            worker_pb2.InfoResponse(
                worker_id=name, instance=name, role=role, address=f"{name}:1", fingerprint=FINGERPRINT,
                block_size=HASH_BLOCK, kv_bytes_per_token=hardware.kv_bytes_per_token,
                total_blocks=hardware.kv_tokens // HASH_BLOCK,
            ),
            clock,
        )  # fmt: skip
        index.join(name, name, FINGERPRINT)
        self.truth = model
        self.hardware = hardware
        self.cache = PrefixCache(hardware.kv_tokens // HASH_BLOCK, self._stored, self._removed)
        self.num_transfers = 0  # on their way here
        self.wire_free_at = 0.0
        self._time, self._index, self._rng = clock, index, random.Random(f"{seed}{name}")
        self._sequence = 0
        self._cost = StepCost(_ATTENTION_WORK)
        self._waiting: deque[Prompt] = deque()
        self._prompts: list[Prompt] = []
        self._ready: deque[tuple[Arrival, Callable[[], None]]] = deque()  # wait for a place to decode
        self._decoding: list[Decoding] = []
        self._kv_tokens = 0
        self._steps = 0
        self._number = 0
        self._running = False
        self._report_due = False
        self._report_at = -1.0
        self._warm_up()
        self.report(self._stats())

    # ------------------------------------------------------------ what is asked of it

    def reserve(self, arrival: Arrival) -> int | None:
        """Room for a request that will decode here: blocks of it that are here; None: there is no room."""
        hit = self.cache.hit(arrival.hashes)
        if not self.cache.has_room(arrival.hashes[:hit], arrival.total_blocks - hit):
            return None
        self.cache.hold(arrival.hashes[:hit], arrival.total_blocks - hit)
        self.num_transfers += 1
        self._changed()
        return hit

    def start(self, arrival: Arrival, hit: int, finished: Callable[[], None]) -> None:
        """Its KV is here."""
        self.num_transfers -= 1
        self.cache.publish(arrival.hashes[hit:])
        self._ready.append((arrival, finished))
        self._wake()

    def take(self, hashes: Sequence[bytes]) -> None:
        """Blocks that another worker had; they stay as cached ones."""
        if self.cache.has_room((), len(hashes)):
            self.cache.hold((), len(hashes))
            self.cache.publish(hashes)
            self.cache.release(hashes, 0)

    def submit(self, prompt: Prompt) -> None:
        self._waiting.append(prompt)
        self._wake()

    def decode_own(self, arrival: Arrival, finished: Callable[[], None]) -> None:
        """Goes on with a prompt that was computed here."""
        self.cache.hold((), arrival.total_blocks - arrival.prompt_blocks)
        self._ready.append((arrival, finished))
        self._wake()

    def release(self, prompt: Prompt) -> None:
        """A prompt's KV has been sent."""
        hashes = prompt.arrival.hashes
        self.cache.release(hashes, prompt.blocks - len(hashes))
        self._changed()

    # ------------------------------------------------------------ its steps

    def _wake(self) -> None:
        self._changed()
        if not self._running:
            self._running = True
            self._time.after(0.0, self._step)

    def _step(self) -> None:
        while self._ready and len(self._decoding) < self.hardware.max_num_seqs:
            arrival, finished = self._ready.popleft()
            self._number += 1
            last = self._steps + max(arrival.output_tokens - 1, 1)
            heapq.heappush(self._decoding, Decoding(last, self._number, arrival, finished))
            self._kv_tokens += len(arrival.prompt)
        batch = len(self._decoding)
        chunks = self._take_chunks(batch)
        tokens = sum(count for _, count in chunks)
        if not batch and not tokens:
            self._running = False
            return
        attended = sum(count * (prompt.done + count / 2) for prompt, count in chunks)
        ms = self._milliseconds(batch, tokens, attended)
        if self._steps < 100 or not self._steps % _LEARN_EVERY:
            self._cost.add((tokens, attended), (batch, self._kv_tokens if batch else 0), ms)
        self._time.after(ms / 1000, lambda: self._land(chunks, batch))

    def _take_chunks(self, batch: int) -> list[tuple[Prompt, int]]:
        if not self._waiting and not self._prompts:
            return []
        budget = _CHUNK - batch
        if batch:
            budget = min(budget, max(self._cost.prefill_tokens(_PREFILL_DELAY_MS), 64))
        while self._waiting and sum(p.rest for p in self._prompts) < budget:
            prompt = self._waiting[0]
            hashes = prompt.arrival.hashes
            prompt.hit = min(self.cache.hit(hashes), (len(prompt.arrival.prompt) - 1) // HASH_BLOCK)
            prompt.blocks = prompt.arrival.prompt_blocks
            if not self.cache.has_room(hashes[: prompt.hit], prompt.blocks - prompt.hit):
                break
            self._waiting.popleft()
            self.cache.hold(hashes[: prompt.hit], prompt.blocks - prompt.hit)
            prompt.done = prompt.hit * HASH_BLOCK
            self._prompts.append(prompt)
            prompt.started()
        chunks: list[tuple[Prompt, int]] = []
        for prompt in self._prompts:
            count = min(prompt.rest, budget)
            if count:
                chunks.append((prompt, count))
                budget -= count
        return chunks

    def _milliseconds(self, batch: int, tokens: int, attended: float) -> float:
        model = self.truth
        ms = model.decode_ms(batch, self._kv_tokens) if batch else model.prefill_base_ms
        ms += model.prefill_ms_per_token * tokens + model.prefill_ms_per_attended * attended
        return ms * self._rng.lognormvariate(0, _NOISE)

    def _land(self, chunks: list[tuple[Prompt, int]], batch: int) -> None:
        self._steps += 1
        self._kv_tokens += batch
        while self._decoding and self._decoding[0].finish <= self._steps:
            done = heapq.heappop(self._decoding)
            self._kv_tokens -= len(done.arrival.prompt) + max(done.arrival.output_tokens - 1, 1)
            self._finish(done)
        for prompt, count in chunks:
            prompt.done += count
            if not prompt.rest:
                self._prompts.remove(prompt)
                self.cache.publish(prompt.arrival.hashes[prompt.hit :])
                prompt.computed()
        self._changed()
        self._step()

    def _finish(self, done: Decoding) -> None:
        arrival = done.arrival
        new = arrival.all_hashes[len(arrival.hashes) :]
        self.cache.publish(new)
        self.cache.release(arrival.all_hashes, arrival.total_blocks - len(arrival.all_hashes))
        done.finished()

    # ------------------------------------------------------------ what it tells

    def _warm_up(self) -> None:
        for length in (16, 64) * 4:
            self._cost.add((length, length**2 / 2), (0, 0), self._milliseconds(0, length, length**2 / 2))
            for batch in (1, 4):
                self._kv_tokens = batch * length
                self._cost.add((0, 0), (batch, self._kv_tokens), self._milliseconds(batch, 0, 0))
        self._kv_tokens = 0

    def _changed(self) -> None:
        if not self._report_due:
            self._report_due = True
            self._time.after(max(self._report_at + _REPORT_EVERY_S - self._time.now, 0.0), self._send)

    def _send(self) -> None:
        self._report_due, self._report_at = False, self._time.now
        stats = self._stats()
        self._time.after(_REPORT_TAKES_S, lambda: self.report(stats))

    def _stats(self) -> worker_pb2.StatsResponse:
        work = [(p.rest, p.done) for p in self._prompts]
        for prompt in self._waiting:
            hit = self.cache.hit(prompt.arrival.hashes) * HASH_BLOCK
            work.append((len(prompt.arrival.prompt) - hit, hit))
        return worker_pb2.StatsResponse(
            free_blocks=max(self.cache.num_free, 0),
            cached_blocks=self.cache.num_cached,
            total_blocks=self.cache.num_blocks,
            num_running=len(self._decoding) + len(self._prompts),
            num_waiting=len(self._waiting) + len(self._ready),
            waiting_transfers=self.num_transfers,
            waiting_prefill_tokens=sum(n for n, _ in work),
            waiting_prefill_attended=sum(n * (c + n / 2) for n, c in work),
            running_kv_tokens=self._kv_tokens,
            max_num_seqs=self.hardware.max_num_seqs,
            step_cost=self._cost.to_proto(),
        )

    def _stored(self, hashes: list[bytes]) -> None:
        self._tell(b"s", hashes)

    def _removed(self, hashes: list[bytes]) -> None:
        self._tell(b"r", hashes)

    def _tell(self, kind: bytes, hashes: list[bytes]) -> None:
        if hashes:
            self._sequence += 1
            number = self._sequence
            self._time.after(_EVENTS_TAKE_S, lambda: self._index.apply(self.worker_id, number, [(kind, hashes)]))


@dataclass(frozen=True)
class Hardware:
    kv_tokens: int
    max_num_seqs: int
    kv_bytes_per_token: int


PREFILL, DECODE = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE
