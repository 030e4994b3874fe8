"""Policies by name. All but pagewire's own are there to compare with; each is a few lines over the same facts.

Those here choose the decode worker for itself, then the prefill worker for itself. A worker of both roles
computes its own prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from pagewire_core.block_hash import HASH_BLOCK

from pagewire_router.cost import MILLISECONDS
from pagewire_router.links import Links
from pagewire_router.load import Ask, Load, Pool
from pagewire_router.plan import Plan, Policy

Terms = dict[str, float]
Side = Callable[[Ask, Load, Pool], Terms]
Alone = Callable[[Ask, Load], bool]

_LEAST = 1e-3  # weight of what only decides between equals
_LLM_D_PREFIX, _LLM_D_QUEUE = 2.0, 1.0
_LLM_D_NON_CACHED_TOKENS = 16
_PLANS, _SOURCES = 64, 8  # that are looked at, at the least; and prefill workers for one decode worker


def _independent(prefill: Side, decode: Side, alone: Alone, ask: Ask, pool: Pool, links: Links) -> list[Plan]:
    """Plans by the decode worker's cost, and by the prefill worker's among those of one decode worker.

    Among hundreds of workers only the best are paired, and all that are as good as those.
    """
    cost_p, by_prefill = _ranked(ask, pool.prefill, pool, prefill, "_p")
    cost_d, by_decode = _ranked(ask, pool.decode, pool, decode, "_d")
    found: list[tuple[float, Plan]] = []
    for d in by_decode:
        terms = cost_d[d.worker_id]
        cost = sum(terms.values())
        if len(found) >= _PLANS and cost > found[-1][0]:
            break
        sources = [] if alone(ask, d) else list(islice(pool.sources(d, by_prefill), _SOURCES))
        pairing = [p for p in sources if p.worker_id not in pool.ending]
        found += [(cost, Plan(p.worker_id, d.worker_id, {**cost_p[p.worker_id], **terms})) for p in pairing]
        if not sources:
            found.append((cost, Plan(None, d.worker_id, terms)))
    return [plan for _, plan in sorted(found, key=lambda pair: (pair[0], pair[1].cost))]


def _ranked(ask: Ask, workers: Sequence[Load], pool: Pool, side: Side, leg: str) -> tuple[dict[str, Terms], list[Load]]:
    """Every worker's terms, and the workers by their sum."""
    costs = {w.worker_id: {name + leg: value for name, value in side(ask, w, pool).items()} for w in workers}
    return costs, sorted(workers, key=lambda w: sum(costs[w.worker_id].values()))


def _computes_itself(ask: Ask, d: Load) -> bool:
    return d.can_prefill


def _turn(ask: Ask, w: Load, pool: Pool) -> Terms:
    """Whoever was placed on the longest ago is next."""
    return {"turn": w.turn}


def _waiting_tokens(ask: Ask, p: Load, pool: Pool) -> Terms:
    return {"waiting_tokens": p.waiting_tokens}


def _sequences(ask: Ask, d: Load, pool: Pool) -> Terms:
    return {"sequences": d.num_sequences}


def _missing(ask: Ask, w: Load, pool: Pool) -> Terms:
    """The share of the prompt that a worker lacks, in [0, 1]; the less loaded of equals."""
    load = w.num_sequences + w.waiting_tokens / HASH_BLOCK
    return {"missing": 1 - _matched(ask, w), "load": _LEAST * load / (1 + load)}


def _matched(ask: Ask, w: Load) -> float:
    return min(w.hit_tokens / ask.prompt_tokens, 1.0)


def _dynamo_prefill(ask: Ask, p: Load, pool: Pool) -> Terms:
    """NVIDIA Dynamo, lib/kv-router/src/scheduling/selector/default.rs, with its defaults: scale and credit 1, decay 0.

    Blocks to compute, those that are active there included, less what overlaps, plus the blocks held.
    """
    raw = (p.waiting_tokens + ask.prompt_tokens) / HASH_BLOCK
    return {"prefill_blocks": max(0.0, raw - p.hit_tokens / HASH_BLOCK), "decode_blocks": p.kv_tokens / HASH_BLOCK}


def _dynamo_decode(ask: Ask, d: Load, pool: Pool) -> Terms:
    """The same with overlap credit and prefill load 0, as it chooses decode workers by default."""
    return {"decode_blocks": (d.kv_tokens + ask.prompt_tokens) / HASH_BLOCK}


def _llm_d(ask: Ask, w: Load, pool: Pool) -> Terms:
    """llm-d, deploy/config/pd-epp-config.yaml: 2 * prefix + 1 * queue, each in [0, 1] and more being better."""
    shortest, longest = pool.decode_queues if w.can_decode else pool.prefill_queues
    spread = longest - shortest
    queue = (longest - w.num_waiting) / spread if spread else 1.0
    return {"prefix": -_LLM_D_PREFIX * _matched(ask, w), "queue": -_LLM_D_QUEUE * queue}


def _llm_d_alone(ask: Ask, d: Load) -> bool:
    return d.can_prefill or ask.prompt_tokens - d.hit_tokens < _LLM_D_NON_CACHED_TOKENS


def _policy(unit: str, prefill: Side, decode: Side, alone: Alone = _computes_itself) -> Policy:
    return Policy(unit, partial(_independent, prefill, decode, alone))


POLICIES: dict[str, Policy] = {
    "pagewire": MILLISECONDS,
    "round_robin": _policy("turns", _turn, _turn),
    "least_loaded": _policy("tokens, sequences", _waiting_tokens, _sequences),
    "prefix": _policy("share", _missing, _missing),
    "dynamo": _policy("blocks", _dynamo_prefill, _dynamo_decode),
    "llm_d": _policy("score", _llm_d, _llm_d, _llm_d_alone),
}


def name_of(policy: Policy) -> str:
    return next(name for name, known in POLICIES.items() if known is policy)
