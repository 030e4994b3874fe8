"""Policies by name. All but pagewire's own are there to compare with; each is a few lines over the same facts.

Those here choose the decode worker for itself, then the prefill worker for itself. A worker of both roles
computes its own prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


def _independent(prefill: Side, decode: Side, alone: Alone, ask: Ask, pool: Pool, links: Links) -> list[Plan]:
    """Plans by the decode worker's cost, and by the prefill worker's among those of one decode worker."""
    cost_p = {p.worker_id: _named(prefill(ask, p, pool), "_p") for p in pool.prefill}
    found: list[tuple[float, Plan]] = []
    for d in pool.decode:
        cost_d = _named(decode(ask, d, pool), "_d")
        sources = list(pool.sources(d))
        if alone(ask, d) or not sources:
            found.append((sum(cost_d.values()), Plan(None, d.worker_id, cost_d)))
            continue
        found += (
            (sum(cost_d.values()), Plan(p.worker_id, d.worker_id, {**cost_p[p.worker_id], **cost_d})) for p in sources
        )
    return [plan for _, plan in sorted(found, key=lambda pair: (pair[0], pair[1].cost))]


def _named(terms: Terms, leg: str) -> Terms:
    return {name + leg: value for name, value in terms.items()}


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
    workers = pool.decode if w.can_decode else pool.prefill
    queues = [other.num_waiting for other in workers]
    spread = max(queues) - min(queues)
    queue = (max(queues) - w.num_waiting) / spread if spread else 1.0
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
