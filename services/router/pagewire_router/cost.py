"""pagewire's own policy: the plan with the least predicted milliseconds, of all pairs and of decode alone.

    hit          leading prompt tokens that a worker has (prefix index)
    pair(p, d)   queue      queue_p                        the prompts that are there already
                 fetch      getting what another worker has, where that is cheaper than computing it; then a hit
                 prefill    t_pre(prompt - hit_p, hit_p)
                 delay      t_pre * N                      it holds up the prompts that come after it; about as many as
                                                           wait now, on average, at a prefill worker. t_pre as of a
                                                           usual one: N times what a worker thinks that it is quicker
                                                           than its equals would be more than its queue
                 transfer   max(0, x - 0.7 * t_pre)        moving the KV, as far as computing does not hide it
                 held       queue_d - (queue_p + t_pre)    its tokens come between the chunks of what d computes itself,
                                                           as far as that is not done by then: 50 ms each at most
    local(d)     queue      queue_d                        these two with the steps of the B others in between
                 prefill    t_pre(prompt - hit_d, hit_d)
                 stall      B * t_pre                      the others wait for the prompt's chunks
                 role       t_pre + 20 ms                  on a worker of role decode: others will come and wait, and
                                                           a few milliseconds are less than the error of all this
                                                           d is also any prefill worker for a request of one token,
                                                           with its queue, prefill and delay; it then pairs with nobody
    both         decode     E[out] * t_dec(B + n, K + L)   the request's own steps, beyond the quickest worker's
                 harm       E[out] * (t_dec(B + n, K + L) - t_dec(B, K)) * B    what they cost the B others
                 eviction   t_pre of cached prefixes that make room, times how likely they were to be used
                 session    a discount of 5 % where the session's last request decoded

The unit is time throughout, so that decode alone is one more candidate and not a threshold. Only the best few
decode workers are paired with the best few prefill workers: the one term that belongs to a pair is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from pagewire_router.links import Links
from pagewire_router.load import Ask, Load, Pool, StepModel
from pagewire_router.plan import Plan, Policy

OVERLAP = 0.7  # share of the prompt's computation that hides its transfer
_TIE_RATIO = 1.03  # plans within 3 % of the best are equal: choosing among them at random avoids herds
_TIE_MS = 1.0  # step costs are no better known: a worker that was held up while it measured must still get work
_SESSION = 0.05
_REUSE = 0.1  # of a cached prefix that makes room: it is the one that was not used for longest
_WIDTH = 4  # workers of each kind that are paired
_SMALL_REST = 64  # tokens: less is not worth a transfer
_ROLE_MS = 20.0  # what a decode worker must save, at the least, to compute a prompt
_STEP_MS = 50.0  # of a prompt between two tokens of those that decode beside it (--max-prefill-delay-ms)

Terms = dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """Milliseconds until the first token, and that the KV moves after it; 0 if none moves."""

    ttft_ms: float
    transfer_ms: float


def predict(ask: Ask, p: Load | None, d: Load, links: Links) -> Prediction:
    """Of a plan, whatever policy made it. Who computes the prompt comes with what it fetches (`Pool.fetching`)."""
    if p is None:
        return Prediction(_beside_decoding(d, d.queue_ms + d.model.prefill_ms(*to_compute(ask, d))) + _fetch_ms(d), 0.0)
    prefill = p.model.prefill_ms(*to_compute(ask, p))
    return Prediction(p.queue_ms + _fetch_ms(p) + prefill, _tail_ms(ask, p, d, prefill, links))


def plans(ask: Ask, pool: Pool, links: Links) -> list[Plan]:
    """The plans that may serve the request, cheapest first; empty if the workers cannot serve it."""
    decode = {d.worker_id: _decode(ask, d) for d in pool.decode}
    quickest = min((terms["decode"] for terms in decode.values()), default=0.0)
    for terms in decode.values():  # what every plan has would make all of them look equal
        terms["decode"] -= quickest
    crowd = _crowd(ask, pool)
    usual = _usual_model(pool)
    prefill = {p.worker_id: _prefill(ask, pool.fetching(p), crowd, usual) for p in pool.prefill}
    by_decode = _ranked(pool.decode, decode)
    by_prefill = _ranked(pool.prefill, prefill)
    found = []
    for d in map(pool.fetching, _helpers(by_decode)):
        legs = _prefill(ask, d, 0.0, d.model) if d.can_decode else prefill[d.worker_id]
        found.append(_local(ask, d, {**legs, **decode[d.worker_id]}, _reluctance(ask, d, pool)))
    for d in by_decode[:_WIDTH]:
        if (d.can_prefill or ask.goes_on) and ask.prompt_tokens - d.hit_tokens < _SMALL_REST:
            continue
        for p in islice(pool.sources(d, by_prefill), _WIDTH):
            if p.worker_id not in pool.ending:
                found.append(_pair(ask, p, d, {**prefill[p.worker_id], **decode[d.worker_id]}, links))
    return sorted(found, key=lambda plan: plan.cost)


MILLISECONDS = Policy("ms", plans, _TIE_RATIO, _TIE_MS)


def _ranked(workers: Iterable[Load], terms: Mapping[str, Terms]) -> list[Load]:
    return sorted(workers, key=lambda w: sum(terms[w.worker_id].values()))


def _helpers(by_decode: list[Load]) -> list[Load]:
    """Decode workers that might compute the prompt themselves: the least busy ones, and those that have most of it."""
    idle = sorted(by_decode[: 4 * _WIDTH], key=lambda d: d.queue_ms)[:_WIDTH]
    warm = sorted((d for d in by_decode if d.hit_tokens), key=lambda d: -d.hit_tokens)[:_WIDTH]
    return list({d.worker_id: d for d in (*by_decode[:_WIDTH], *idle, *warm)}.values())


def _rest(ask: Ask, w: Load) -> tuple[int, int]:
    """Tokens to compute, and those before them. The last one is always computed, to get the first logits."""
    hit = min(w.hit_tokens, ask.prompt_tokens - 1)
    return ask.prompt_tokens - hit, hit


def to_compute(ask: Ask, w: Load) -> tuple[int, int]:
    """As `_rest`, when what is better fetched than computed has been fetched."""
    hit = max(w.hit_tokens, w.fetch.tokens if w.fetch else 0)
    hit = min(hit, ask.prompt_tokens - 1)
    return ask.prompt_tokens - hit, hit


def _fetch_ms(w: Load) -> float:
    return w.fetch.ms if w.fetch else 0.0


def _crowd(ask: Ask, pool: Pool) -> float:
    """Prompts that wait at a prefill worker, on average."""
    if not ask.usual_prefill_ms or not pool.prefill:
        return 0.0
    return sum(p.queue_ms for p in pool.prefill) / len(pool.prefill) / ask.usual_prefill_ms


def _usual_model(pool: Pool) -> StepModel:
    """Of the prefill worker in the middle."""
    models = sorted((p.model for p in pool.prefill), key=lambda m: m.prefill_ms_per_token)
    return models[len(models) // 2] if models else StepModel()


def _prefill(ask: Ask, p: Load, crowd: float, usual: StepModel) -> Terms:
    rest = to_compute(ask, p)
    terms = {
        "queue": p.queue_ms,
        "prefill": p.model.prefill_ms(*rest),
        "delay": crowd * usual.prefill_ms(*rest),
        "eviction": _evicted_ms(p, _rest(ask, p)[0]),
    }
    return terms | {"fetch": p.fetch.ms} if p.fetch else terms


def _decode(ask: Ask, d: Load) -> Terms:
    with_it = d.model.decode_ms(
        d.num_sequences + ask.n, d.kv_tokens + int(ask.n * (ask.prompt_tokens + ask.output_tokens / 2))
    )
    without_it = d.model.decode_ms(d.num_sequences, d.kv_tokens)
    more_tokens = max(ask.prompt_tokens - d.hit_tokens, 0) + int(ask.n * ask.output_tokens)
    return {
        "decode": ask.output_tokens * with_it,
        "harm": ask.output_tokens * (with_it - without_it) * d.num_sequences,
        "eviction_d": _evicted_ms(d, more_tokens),
        "held": min(_beside_decoding(d, d.queue_ms), ask.output_tokens * _STEP_MS),
    }


def _pair(ask: Ask, p: Load, d: Load, legs: Terms, links: Links) -> Plan:
    until_there = legs["queue"] + legs.get("fetch", 0.0) + legs["prefill"]
    held = max(legs["held"] - until_there, 0.0)
    return _plan(ask, p, d, {**legs, "transfer": _tail_ms(ask, p, d, legs["prefill"], links), "held": held})


def _reluctance(ask: Ask, d: Load, pool: Pool) -> float:
    """What must be saved for a decode worker to compute a prompt: nothing if it has all but a little of it."""
    nearly_all = ask.prompt_tokens - d.hit_tokens < _SMALL_REST <= d.hit_tokens
    if d.can_prefill or nearly_all or not pool.has_source(d):
        return 0.0
    return d.model.prefill_ms(*to_compute(ask, d)) + _ROLE_MS


def _local(ask: Ask, d: Load, legs: Terms, reluctance: float) -> Plan:
    computing = legs["prefill"]
    own = {
        "queue": _beside_decoding(d, d.queue_ms),
        "prefill": _beside_decoding(d, computing),
        "stall": d.num_sequences * computing,
        "role": reluctance,
        "held": 0.0,  # it waits for the same prompts in the queue
    }
    return _plan(ask, None, d, {**legs, **own})


def _beside_decoding(d: Load, prefill_ms: float) -> float:
    """What computing prompts takes where others decode: they go on between the chunks."""
    steps = math.ceil(prefill_ms / _STEP_MS) if d.num_sequences else 0
    return prefill_ms + steps * d.model.decode_ms(d.num_sequences, d.kv_tokens)


def _tail_ms(ask: Ask, p: Load, d: Load, prefill_ms: float, links: Links) -> float:
    """What is left of moving the KV when the first token is there."""
    num_bytes = _rest(ask, d)[0] * p.kv_bytes_per_token
    return max(0.0, links(p.worker_id, d.worker_id).transfer_ms(num_bytes) - OVERLAP * prefill_ms)


def _plan(ask: Ask, p: Load | None, d: Load, terms: Terms) -> Plan:
    if ask.previous == d.worker_id:
        terms["session"] = -max(_SESSION * sum(terms.values()), 2 * _TIE_MS)  # a tie goes there, too
    return Plan(p.worker_id if p else None, d.worker_id, terms)


def _evicted_ms(w: Load, tokens: int) -> float:
    evicted = tokens - w.unused_tokens
    return _REUSE * w.model.prefill_ms(evicted) if evicted > 0 else 0.0
