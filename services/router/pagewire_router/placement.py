"""Chooses workers for one attempt and books the work on them."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass

from pagewire_core.block_hash import HASH_BLOCK, block_hashes, chain_root
from pagewire_core.prefix_index import PrefixIndex

from pagewire_router import cost
from pagewire_router.request import ValidRequest
from pagewire_router.workers import Worker, WorkerTable


@dataclass(frozen=True)
class Placed:
    """`prefill` None: the decode worker computes the prompt itself."""

    prefill: Worker | None
    decode: Worker
    cache_root: bytes
    compute_tokens: int  # prompt tokens that the index does not promise

    @property
    def decision(self) -> str:
        return "local" if self.prefill is None else "pair"


class Placement:
    """`rates` learns how fast pairs move KV; `rng` breaks ties."""

    def __init__(self, workers: WorkerTable, index: PrefixIndex, rng: random.Random | None = None) -> None:
        self._workers = workers
        self._index = index
        self._rng = rng or random.Random()
        self.rates = cost.LinkRates()

    def place(
        self, request: ValidRequest, avoid: Set[str] = frozenset(), refused: Set[str] = frozenset()
    ) -> Placed | None:
        """The best plan now; None if no worker can serve the request.

        Workers in `avoid` are used only if there is no plan without them, those in `refused` not at all.
        """
        live = self._workers.live
        roots = {w.info.fingerprint: chain_root(w.info.fingerprint, cache_salt=request.cache_salt) for w in live}
        loads = self._loads(request, live, roots)
        ask = cost.Ask(len(request.prompt_ids), request.n, request.sampling.max_tokens)
        for pool in (cost.without(loads, avoid), loads):
            plans = [p for p in cost.plans(ask, pool, self.rates) if refused.isdisjoint(p.workers)]
            if plans:
                return self._bind(request, cost.choose(plans, self._rng), loads, roots)
        return None

    def _loads(self, request: ValidRequest, live: Sequence[Worker], roots: dict[bytes, bytes]) -> list[cost.Load]:
        hits: dict[bytes, dict[str, int]] = {
            fingerprint: self._index.match(block_hashes(root, request.prompt_ids))
            for fingerprint, root in roots.items()
        }
        return [w.load(hits[w.info.fingerprint].get(w.worker_id, 0) * HASH_BLOCK) for w in live]

    def _bind(
        self, request: ValidRequest, plan: cost.Plan, loads: Sequence[cost.Load], roots: dict[bytes, bytes]
    ) -> Placed:
        hits = {load.worker_id: load.hit_tokens for load in loads}
        decode = self._workers.get(plan.decode)
        prefill = self._workers.get(plan.prefill) if plan.prefill is not None else None
        assert decode is not None
        assert plan.prefill is None or prefill is not None
        compute_tokens = len(request.prompt_ids) - hits[plan.prefill or plan.decode]
        return Placed(prefill, decode, roots[decode.info.fingerprint], compute_tokens)
