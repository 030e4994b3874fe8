"""The router's own placement in front of simulated workers: every request from its arrival to its last token."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pagewire.v1 import common_pb2
from pagewire_core.block_hash import HASH_BLOCK
from pagewire_core.prefix_index import PrefixIndex
from pagewire_router.attempt import INDEX_DELAY_S
from pagewire_router.load import StepModel
from pagewire_router.placement import Placed, Placement
from pagewire_router.plan import Policy
from pagewire_router.request import ValidRequest

from pagewire_bench.simulator.clock import Clock
from pagewire_bench.simulator.traces import Arrival
from pagewire_bench.simulator.worker import DECODE, PREFILL, Hardware, Prompt, SimWorker

_CALL_S = 0.001  # a message between two processes
_BACKOFF_S = 0.05  # of a request that no decode worker had room for
_DRAIN_S = 20.0  # after the last arrival: what is not over then is not counted as good
_LAST_CHUNK_S = 0.002  # what cannot be sent before the prompt is computed


@dataclass(frozen=True)
class FleetConfig:
    """`speeds` and `bandwidths`: what a worker's factor of step times, and bytes per second, are drawn from."""

    num_prefill: int
    num_decode: int
    model: StepModel
    hardware: Hardware
    speeds: tuple[float, ...] = (1.0,)
    bandwidths: tuple[float, ...] = (10e9,)


class Fleet:
    """`live` and `get` are what the placement asks of its workers."""

    def __init__(self, config: FleetConfig, policy: Policy, seed: int) -> None:
        rng = random.Random(seed)
        self.clock = Clock()
        index = PrefixIndex()
        self._bandwidth: dict[str, float] = {}
        self._by_id: dict[str, SimWorker] = {}
        for role, letter, count in ((PREFILL, "p", config.num_prefill), (DECODE, "d", config.num_decode)):
            for number in range(count):
                name = f"{letter}{number}"
                self._bandwidth[name] = rng.choice(config.bandwidths)
                model = _slower(config.model, rng.choice(config.speeds))
                self._by_id[name] = SimWorker(name, role, model, config.hardware, self.clock, index, seed)
        self.live = list(self._by_id.values())
        self._placement: Placement[SimWorker] = Placement(self, index, policy, rng=rng)
        for worker in self.live:
            self._placement.joined(worker)
        self.arrivals: list[Arrival] = []

    def get(self, worker_id: str) -> SimWorker | None:
        return self._by_id.get(worker_id)

    def run(self, trace: Iterable[tuple[float, Arrival]], seconds: float) -> list[Arrival]:
        """Every request that came within that time, as far as it got some time after it."""
        for at, arrival in trace:
            self.clock.after(at, lambda arrival=arrival: self._arrive(arrival))  # type: ignore[misc]
        self._closes = seconds
        self.clock.run(seconds + _DRAIN_S)
        return self.arrivals

    def send(self, source: SimWorker, target: SimWorker, num_bytes: int, since: float) -> float:
        """When bytes that could be sent since then are there; both ends send and receive one thing at a time."""
        rate = min(self._bandwidth[source.worker_id], self._bandwidth[target.worker_id])
        busy = num_bytes / rate + _CALL_S
        end = max(since, source.wire_free_at, target.wire_free_at) + busy
        source.wire_free_at = target.wire_free_at = end
        self._placement.links.observe(source.worker_id, target.worker_id, num_bytes, busy)
        return end

    def _arrive(self, arrival: Arrival) -> None:
        if self.clock.now > self._closes:
            return
        arrival.at = self.clock.now
        self.arrivals.append(arrival)
        self._place(arrival, set())

    def _place(self, arrival: Arrival, refused: set[str]) -> None:
        request = ValidRequest(
            request_id="", model="", prompt_ids=arrival.prompt, n=1, echo_text=None, cache_salt=b"",
            sampling=common_pb2.SamplingParams(max_tokens=1024), return_prompt_token_ids=False,
            session_id=arrival.session,
        )  # fmt: skip
        placed = self._placement.place(request, refused=refused)
        if placed is None:
            self.clock.after(_BACKOFF_S, lambda: self._place(arrival, set()))
            return
        Life(self, arrival, placed, refused).begin()


class Life:
    """One attempt."""

    def __init__(self, fleet: Fleet, arrival: Arrival, placed: Placed[SimWorker], refused: set[str]) -> None:
        self._fleet, self._arrival, self._placed, self._refused = fleet, arrival, placed, refused
        self._held = contextlib.ExitStack()  # the bookings, as an Attempt of the router has them
        self._prefill_held = contextlib.ExitStack()
        self._hit = 0
        self._began = 0.0

    def begin(self) -> None:
        if self._placed.prefill is not None:
            self._prefill_held.enter_context(self._placed.prefill.booked(self._placed.prefill_booking))
        self._held.enter_context(self._placed.decode.booked(self._placed.decode_booking))
        self._arrival.plan = self._placed.decision
        self._after(self._reserve if self._placed.prefill else self._local)

    def _after(self, what: object, seconds: float = _CALL_S) -> None:
        self._fleet.clock.after(seconds, what)  # type: ignore[arg-type]

    def _local(self) -> None:
        self._prompt = Prompt(self._arrival, self._computed_here)
        self._submit(self._placed.decode)

    def _submit(self, worker: SimWorker) -> None:
        """The prompt's computation, after what is fetched for it from another worker."""
        placed = self._placed
        if placed.fetch is None or placed.holder is None:
            worker.submit(self._prompt)
            return
        hashes = self._arrival.hashes[: placed.fetch.tokens // HASH_BLOCK]
        there = hashes[: placed.holder.cache.hit(hashes)]
        num_bytes = len(there) * HASH_BLOCK * worker.info.kv_bytes_per_token
        end = self._fleet.send(placed.holder, worker, num_bytes, self._fleet.clock.now)

        def fetched() -> None:
            worker.take(there)
            worker.submit(self._prompt)

        self._after(fetched, end - self._fleet.clock.now)

    def _computed_here(self) -> None:
        self._first_token()
        self._placed.decode.decode_own(self._arrival, self._finished)

    def _reserve(self) -> None:
        assert self._placed.prefill is not None
        hit = self._placed.decode.reserve(self._arrival)
        if hit is None:
            self._prefill_held.close()
            self._held.close()
            self._fleet._place(self._arrival, self._refused | {self._placed.decode.worker_id})
            return
        self._hit = hit
        self._prompt = Prompt(self._arrival, self._computed, self._started)
        self._after(lambda: self._submit(self._placed.prefill))  # type: ignore[arg-type]

    def _started(self) -> None:
        self._began = self._fleet.clock.now

    def _computed(self) -> None:
        self._first_token()
        prefill, decode, now = self._placed.prefill, self._placed.decode, self._fleet.clock.now
        assert prefill is not None
        num_bytes = (len(self._arrival.prompt) - self._hit * HASH_BLOCK) * prefill.info.kv_bytes_per_token
        end = self._fleet.send(prefill, decode, num_bytes, self._began)
        self._after(self._sent, max(end - now, _LAST_CHUNK_S))

    def _sent(self) -> None:
        prefill, decode = self._placed.prefill, self._placed.decode
        assert prefill is not None
        prefill.release(self._prompt)
        self._after(self._prefill_held.close, INDEX_DELAY_S)
        decode.start(self._arrival, self._hit, self._finished)

    def _first_token(self) -> None:
        self._arrival.first_token = self._fleet.clock.now + _CALL_S

    def _finished(self) -> None:
        arrival, clock = self._arrival, self._fleet.clock
        arrival.finished = clock.now + _CALL_S
        self._prefill_held.close()
        self._held.close()
        self._fleet._placement.observe_output(arrival.output_tokens)
        if following := arrival.then(arrival):
            seconds, next_one = following
            clock.after(seconds, lambda: self._fleet._arrive(next_one))


def _slower(model: StepModel, factor: float) -> StepModel:
    facts = {name: value * factor for name, value in vars(model).items()}
    return replace(model, **facts)
