"""How many workers a traffic takes, from what their steps cost: queueing formulas, no simulation.

    S   a prompt, alone: t_pre(computed, cached)                    (pagewire_router.load.StepModel)
    s   what one more sequence adds to a decode step: per_sequence + per_kv_token * (prompt + output / 2)
    v   standard deviation of prompt lengths over their mean

    prefill, n workers   busy = rate * S / n
                         waiting W (Allen and Cunneen; Sakasegawa 1977):
                             P(W > 0) = busy ** (sqrt(2 (n + 1)) - 1),  E[W | W > 0] = S (1 + v^2) / (2 n (1 - busy))
                         TTFT: a gamma distribution (Wilson and Hilferty 1931) with the mean and the variance of S + W
    decode, n workers    B others beside a sequence, a Poisson number by Little's law and PASTA:
                             step = base + s (1 + B),  B = rate / n * steps * step
                         =>  step = (base + s) / (1 - rate / n * steps * s)
    both, n workers      prompts take a share u of the time and stretch every step by 1 / (1 - u); how many come during
                         an answer is a Poisson number; a prompt is computed in chunks with a decode step after each

What it leaves out: prompts that share a step (where they are far shorter than 2048 tokens, fewer prefill workers do),
bursts beyond Poisson arrivals, prompts that decode workers compute, the way through router and bridge.
`benchmarks/sizing.py` tells how far off it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

from pagewire_router.cost import OVERLAP
from pagewire_router.load import StepModel

_MOST = 100_000


@dataclass(frozen=True)
class Traffic:
    """`rate` in requests per second; `hit`: share of prompt tokens that a cache has; `variation` of prompt lengths."""

    rate: float
    prompt_tokens: int
    output_tokens: int
    hit: float = 0.0
    variation: float = 0.5

    @property
    def cached(self) -> int:
        return min(round(self.hit * self.prompt_tokens), self.prompt_tokens - 1)

    @property
    def computed(self) -> int:
        return self.prompt_tokens - self.cached

    @property
    def steps(self) -> int:
        """Decode steps of an answer: its first token comes with the prompt."""
        return self.output_tokens - 1

    @property
    def sequence_tokens(self) -> float:
        """KV of a sequence, on average over its life."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True)
class Targets:
    """Milliseconds that a share `percentile` / 100 of the requests keeps."""

    ttft_ms: float
    itl_ms: float
    percentile: float = 90.0

    @property
    def z(self) -> float:
        return NormalDist().inv_cdf(self.percentile / 100)


@dataclass(frozen=True)
class Machine:
    """A worker. 0: not known, and no limit. `bytes_per_s`: of the way that KV takes."""

    model: StepModel
    kv_tokens: int = 0
    max_num_seqs: int = 0
    kv_bytes_per_token: int = 0
    bytes_per_s: float = 0.0
    chunk_ms: float = 50.0


@dataclass(frozen=True)
class Estimate:
    """Of `workers` workers of one kind. `busy` >= 1: they cannot keep up, and nothing else is known."""

    workers: int
    busy: float
    ttft_ms: float = math.inf
    itl_ms: float = math.inf
    sequences: float = math.inf  # on one worker, on average
    peak_kv_tokens: float = math.inf
    gap_ms: float = math.inf  # the longest time between two tokens, behind a chunk of a prompt


@dataclass(frozen=True)
class Sizing:
    traffic: Traffic
    targets: Targets
    machine: Machine

    @property
    def prompt_ms(self) -> float:
        return self.machine.model.prefill_ms(self.traffic.computed, self.traffic.cached)

    @property
    def sequence_ms(self) -> float:
        """What one more sequence adds to a decode step."""
        model = self.machine.model
        return model.decode_ms_per_sequence + model.decode_ms_per_kv_token * self.traffic.sequence_tokens

    @property
    def transfer_ms(self) -> float:
        """Of the KV of what is not in a cache."""
        num_bytes = self.traffic.computed * self.machine.kv_bytes_per_token
        return 1000 * num_bytes / self.machine.bytes_per_s if self.machine.bytes_per_s else 0.0

    @property
    def second_token_ms(self) -> float:
        """What is left of the transfer when the first token is there: the second waits for it."""
        return max(0.0, self.transfer_ms - OVERLAP * self.prompt_ms)

    def prefill(self, workers: int) -> Estimate:
        busy = self._each(workers) * self.prompt_ms
        return Estimate(workers, busy, self._ttft(self.prompt_ms, busy, workers))

    def decode(self, workers: int) -> Estimate:
        return self._decoding(workers, 0.0)

    def both(self, workers: int) -> Estimate:
        model, chunk_ms = self.machine.model, self.machine.chunk_ms or math.inf
        # A step that decodes as well has its base already.
        decoding = self._decoding(workers, max(self.prompt_ms - model.prefill_base_ms, 0.0))
        if decoding.busy >= 1:
            return decoding
        step = self._step_ms(decoding.sequences)
        prompt = self.prompt_ms + math.ceil(self.prompt_ms / chunk_ms) * step * min(decoding.sequences, 1.0)
        ttft = self._ttft(prompt, self._each(workers) * prompt, workers)
        return replace(decoding, ttft_ms=ttft, gap_ms=step + min(self.prompt_ms, chunk_ms))

    def keeps(self, estimate: Estimate, *, ttft: bool = True, itl: bool = True) -> bool:
        """Whether an estimate is within the targets and the machine."""
        if estimate.busy >= 1:
            return False
        if ttft and estimate.ttft_ms > self.targets.ttft_ms:
            return False
        return not itl or (estimate.itl_ms <= self.targets.itl_ms and self._has_room(estimate))

    def at_best(self, kind: Callable[[int], Estimate]) -> Estimate:
        """What no number of workers can better: of so many that nothing waits."""
        return kind(_MOST)

    def fewest(self, kind: Callable[[int], Estimate], *, ttft: bool = True, itl: bool = True) -> Estimate | None:
        """The least number of workers that will do; None if no number does. More workers never do worse."""
        if not self.keeps(self.at_best(kind), ttft=ttft, itl=itl):
            return None
        low, high = 1, 1
        while not self.keeps(kind(high), ttft=ttft, itl=itl):
            low, high = high + 1, min(2 * high, _MOST)
        while low < high:
            middle = (low + high) // 2
            if self.keeps(kind(middle), ttft=ttft, itl=itl):
                high = middle
            else:
                low = middle + 1
        return kind(high)

    def _each(self, workers: int) -> float:
        """Requests per millisecond that come to each."""
        return self.traffic.rate / 1000 / workers

    def _decoding(self, workers: int, prompt_ms: float) -> Estimate:
        """`prompt_ms`: what every prompt takes of the same worker."""
        added, z, each = self.sequence_ms, self.targets.z, self._each(workers)
        share = each * prompt_ms
        busy = share + each * self.traffic.steps * added
        if busy >= 1:
            return Estimate(workers, busy)
        step = (self.machine.model.decode_base_ms + added) / (1 - busy)
        others = each * self.traffic.steps * step  # and as many prompts come during an answer
        spread = prompt_ms * math.sqrt(others * (1 + self.traffic.variation**2)) / max(self.traffic.steps, 1)
        deviation = math.hypot(added * math.sqrt(others) / (1 - share), spread)
        most = 1 + others + z * math.sqrt(others)
        return Estimate(
            workers, busy, itl_ms=step + z * deviation, sequences=others,
            peak_kv_tokens=most * self.traffic.sequence_tokens, gap_ms=self._step_ms(others),
        )  # fmt: skip

    def _step_ms(self, others: float) -> float:
        return self.machine.model.decode_base_ms + self.sequence_ms * (1 + others)

    def _has_room(self, estimate: Estimate) -> bool:
        kv, seats = self.machine.kv_tokens, self.machine.max_num_seqs
        sequences = estimate.peak_kv_tokens / self.traffic.sequence_tokens
        return (not kv or estimate.peak_kv_tokens <= kv) and (not seats or sequences <= seats)

    def _ttft(self, service_ms: float, busy: float, workers: int) -> float:
        """The targets' percentile of waiting and computing."""
        if busy >= 1:
            return math.inf
        v2 = self.traffic.variation**2
        waits = busy ** (math.sqrt(2 * (workers + 1)) - 1)
        wait_ms = service_ms * (1 + v2) / (2 * workers * (1 - busy))
        mean = service_ms + waits * wait_ms
        variance = v2 * service_ms**2 + waits * (2 - waits) * wait_ms**2
        ninth = variance / mean**2 / 9
        return mean * max(1 - ninth + self.targets.z * math.sqrt(ninth), 0.0) ** 3
