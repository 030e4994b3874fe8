"""Which workers serve a request: the cheapest plan, in predicted milliseconds. Pure functions.

    hit         leading prompt tokens that a worker has (prefix index)
    t_pre(w, n) base + per_token * n                                   worker w computing n tokens
    x           (prompt - hit_d) * kv_bytes_per_token / bandwidth(p, d)    moving the KV
    decode_d    E[out] * (base + per_sequence * (B + n)) + E[out] * per_sequence * n * B
                                             the request's own steps, and what it costs the B others
    pair(p, d)  queue_p + t_pre(p, prompt - hit_p) + max(0, x - 0.7 * t_pre) + decode_d
    local(d)    queue_d + t_pre(d, prompt - hit_d) + B * t_pre(d, prompt - hit_d) + decode_d
                                             each running sequence waits for the prompt's chunks

The unit is time throughout, so that decode alone is one more candidate and not a threshold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace

from pagewire.v1 import common_pb2

_OVERLAP = 0.7  # share of the prompt's computation that hides its transfer
_EXPECTED_OUTPUT = 64  # tokens, unless the request allows fewer
_TIE = 1.03  # plans within 3 % of the best are equal: choosing among them at random avoids herds
_TIE_MS = 1.0  # step costs are no better known: a worker that was held up while it measured must still get work
_FULL_MS = 5_000.0  # a worker that has no room now: last choice, not no choice
_SMALL_REST = 64  # tokens: less is not worth a transfer
# Until a worker has measured itself.
_PRIOR_BASE_MS, _PRIOR_MS_PER_TOKEN, _PRIOR_STEP_MS, _PRIOR_MS_PER_SEQUENCE = 5.0, 0.1, 10.0, 0.5


@dataclass(frozen=True)
class Load:
    """One worker as a plan sees it: its last report plus what the router sent since."""

    worker_id: str
    role: int  # common_pb2.WorkerRole
    fingerprint: bytes
    hit_tokens: int = 0
    waiting_tokens: int = 0  # prompt tokens queued
    num_sequences: int = 0  # running and on the way
    free_tokens: int = 1 << 40
    kv_bytes_per_token: int = 0
    prefill_base_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    decode_base_ms: float = 0.0
    decode_ms_per_sequence: float = 0.0

    @property
    def can_prefill(self) -> bool:
        return self.role in (common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_BOTH)

    @property
    def can_decode(self) -> bool:
        return self.role in (common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH)

    def prefill_ms(self, tokens: int) -> float:
        base = self.prefill_base_ms or _PRIOR_BASE_MS
        return base + (self.prefill_ms_per_token or _PRIOR_MS_PER_TOKEN) * tokens if tokens > 0 else 0.0


@dataclass(frozen=True)
class Ask:
    """What a plan is for."""

    prompt_tokens: int
    n: int = 1
    max_tokens: int = _EXPECTED_OUTPUT


@dataclass(frozen=True)
class Plan:
    """`prefill` None: the decode worker computes the prompt itself."""

    prefill: str | None
    decode: str
    cost_ms: float

    @property
    def workers(self) -> tuple[str, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


# (prefill worker, decode worker) -> bytes per second
Bandwidth = Callable[[str, str], float]


def plans(ask: Ask, loads: Sequence[Load], bandwidth: Bandwidth) -> list[Plan]:
    """Every plan that may serve the request, cheapest first; empty if the workers cannot serve it."""
    loads = [_bounded(load, ask) for load in loads]
    found: list[Plan] = []
    for d in (load for load in loads if load.can_decode):
        sources = [p for p in loads if p.can_prefill and p.worker_id != d.worker_id and p.fingerprint == d.fingerprint]
        local, pairs = _local_or_pairs(ask, d, bool(sources))
        if local:
            found.append(Plan(None, d.worker_id, _local_ms(ask, d)))
        if pairs:
            found += (Plan(p.worker_id, d.worker_id, _pair_ms(ask, p, d, bandwidth)) for p in sources)
    return sorted(found, key=lambda plan: plan.cost_ms)


def choose(candidates: Sequence[Plan], rng: random.Random) -> Plan:
    """One of the plans that are within 3 % or a millisecond of the best, each equally likely."""
    best = min(plan.cost_ms for plan in candidates)
    return rng.choice([plan for plan in candidates if plan.cost_ms <= max(best * _TIE, best + _TIE_MS)])


def without(loads: Iterable[Load], excluded: Set[str]) -> list[Load]:
    return [load for load in loads if load.worker_id not in excluded]


def _bounded(load: Load, ask: Ask) -> Load:
    """A hit never covers the whole prompt: its last token is computed to get the first logits."""
    return replace(load, hit_tokens=min(load.hit_tokens, ask.prompt_tokens - 1))


def _local_or_pairs(ask: Ask, d: Load, has_source: bool) -> tuple[bool, bool]:
    """Whether decode worker `d` may compute the prompt itself, and whether a prefill worker may.

    A worker of role decode computes prompts only when nobody else can, or when it has nearly all of one.
    """
    rest = ask.prompt_tokens - d.hit_tokens
    if not has_source:
        return True, False
    if d.can_prefill:
        return True, rest >= _SMALL_REST
    nearly_all = rest < _SMALL_REST <= d.hit_tokens
    return nearly_all, not nearly_all


def _queue_ms(load: Load) -> float:
    return load.prefill_ms(load.waiting_tokens)


def _decode_ms(ask: Ask, d: Load) -> float:
    steps = min(ask.max_tokens, _EXPECTED_OUTPUT)
    per_sequence = d.decode_ms_per_sequence or _PRIOR_MS_PER_SEQUENCE
    own = (d.decode_base_ms or _PRIOR_STEP_MS) + per_sequence * (d.num_sequences + ask.n)
    full = _FULL_MS if ask.prompt_tokens + ask.n > d.free_tokens else 0.0
    return steps * (own + per_sequence * ask.n * d.num_sequences) + full


def _pair_ms(ask: Ask, p: Load, d: Load, bandwidth: Bandwidth) -> float:
    compute = p.prefill_ms(ask.prompt_tokens - p.hit_tokens)
    bytes_to_move = (ask.prompt_tokens - d.hit_tokens) * p.kv_bytes_per_token
    transfer = 1000 * bytes_to_move / bandwidth(p.worker_id, d.worker_id)
    return _queue_ms(p) + compute + max(0.0, transfer - _OVERLAP * compute) + _decode_ms(ask, d)


def _local_ms(ask: Ask, d: Load) -> float:
    compute = d.prefill_ms(ask.prompt_tokens - d.hit_tokens)
    return _queue_ms(d) + compute + d.num_sequences * compute + _decode_ms(ask, d)


class LinkRates:
    """Measured bytes per second between pairs of workers: a moving average, and a prior before."""

    _PRIOR = 500e6
    _WEIGHT = 0.3
    _MIN_BYTES = 64 << 10  # smaller transfers measure latency

    def __init__(self) -> None:
        self._rates: dict[tuple[str, str], float] = {}

    def __call__(self, prefill: str, decode: str) -> float:
        return self._rates.get((prefill, decode), self._PRIOR)

    def observe(self, prefill: str, decode: str, num_bytes: int, seconds: float) -> None:
        if num_bytes < self._MIN_BYTES or seconds <= 0:
            return
        old = self(prefill, decode)
        self._rates[prefill, decode] = old + self._WEIGHT * (num_bytes / seconds - old)
