"""Chooses workers for one attempt and books the work on them."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pagewire_core.block_hash import HASH_BLOCK, block_hashes, chain_root
from pagewire_core.prefix_index import PrefixIndex

from pagewire_router.breakers import Breakers
from pagewire_router.cost import Prediction, predict, to_compute
from pagewire_router.fetch import Fetches
from pagewire_router.ledger import Booking, Ledger
from pagewire_router.links import Links
from pagewire_router.load import EXPECTED_OUTPUT, Ask, Fetch, Load, Pool, anything
from pagewire_router.plan import Plan, Policy
from pagewire_router.policies import POLICIES
from pagewire_router.request import ValidRequest

_EWMA = 0.02  # weight of a request in the expected length of the next one's output
_MAX_SESSIONS = 65_536
_FORGOTTEN = 16  # placements, or twice as many as there are workers: who has had none of them may look slow by mistake

W = TypeVar("W", bound=Ledger)
W_co = TypeVar("W_co", bound=Ledger, covariant=True)


class Workers(Protocol[W_co]):
    @property
    def live(self) -> Sequence[W_co]: ...

    def get(self, worker_id: str) -> W_co | None: ...


@dataclass(frozen=True)
class Placed(Generic[W]):
    """`prefill` None: the decode worker computes the prompt itself."""

    prefill: W | None
    decode: W
    cache_root: bytes
    predicted: Prediction
    prefill_booking: Booking
    decode_booking: Booking
    holder: W | None = None  # whom to ask for what `fetch` says
    fetch: Fetch | None = None
    hit_tokens: int = 0  # of the prompt, that who computes it is expected to have

    @property
    def decision(self) -> str:
        return "local" if self.prefill is None else "pair"

    @property
    def compute_tokens(self) -> int:
        """Prompt tokens that nobody has yet, as far as is known."""
        return (self.decode_booking if self.prefill is None else self.prefill_booking).compute_tokens


@dataclass(frozen=True)
class View:
    """What a request finds: hashes of its blocks and roots of their chains by fingerprint, and all workers."""

    ask: Ask
    loads: Mapping[str, Load]
    fetching: Fetches
    roots: Mapping[bytes, bytes]
    hashes: Mapping[bytes, Sequence[bytes]]

    def computing(self, plan: Plan) -> Load:
        """Who computes the prompt, with what it had better fetch."""
        return self.fetching(self.loads[plan.prefill or plan.decode])


class Placement(Generic[W]):
    """`rng` breaks ties. `links`, `breakers` and `observe_output` learn from what attempts report."""

    def __init__(
        self,
        workers: Workers[W],
        index: PrefixIndex,
        policy: Policy = POLICIES["pagewire"],
        breakers: Breakers | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._workers = workers
        self._index = index
        self._rng = rng or random.Random()
        self._turn = 0
        self._output_tokens = float(EXPECTED_OUTPUT)
        self._prefill_ms = 0.0
        self._sessions: OrderedDict[str, str] = OrderedDict()  # id -> its last decode worker
        self.policy = policy
        self.links = Links()
        self.breakers = breakers or Breakers()

    def joined(self, worker: W) -> None:
        self.links.join(worker.worker_id, worker.info.address)
        self.breakers.forget(worker.worker_id)

    def left(self, worker: W) -> None:
        self.links.leave(worker.worker_id)
        self.breakers.forget(worker.worker_id)

    def switched(self, worker: W) -> None:
        """It has another role: what failed in the one before says nothing of it."""
        self.breakers.forget(worker.worker_id)

    def has(self, worker: W) -> bool:
        """Whether this process is still among the workers."""
        return self._workers.get(worker.worker_id) is worker

    def observe_output(self, tokens: float) -> None:
        """A choice has ended after so many tokens."""
        self._output_tokens += _EWMA * (tokens - self._output_tokens)

    def place(
        self,
        request: ValidRequest,
        avoid: Set[str] = frozenset(),
        refused: Set[str] = frozenset(),
        alone: bool = False,
    ) -> Placed[W] | None:
        """The best plan now; None if no worker that is known to be well can serve the request.

        Workers in `avoid` and what a circuit breaker blocks are used only if there is no plan without them, those in
        `refused` not at all. alone: only plans of one worker.
        """
        view = self.view(request)
        plans = self.plans(view, avoid, refused, alone)
        if not plans:
            return None
        plan = self.policy.choose(plans, self._rng)
        return self._bind(request, view, self._with_a_forgotten_one(plan, plans, view))

    def _with_a_forgotten_one(self, plan: Plan, plans: Sequence[Plan], view: View) -> Plan:
        """Instead of a decode worker alone that has no more of the prompt: a pair with a prefill worker long idle.

        What a worker measured at its start may be far from the truth, and only work can show that.
        """
        decode = view.loads[plan.decode]
        if plan.prefill is not None or decode.can_prefill:
            return plan
        since = self._turn - max(_FORGOTTEN, 2 * len(view.loads))
        for pair in plans:
            prefill = view.loads[pair.prefill] if pair.prefill is not None else None
            if prefill and prefill.turn <= since and not prefill.queue_ms and prefill.hit_tokens >= decode.hit_tokens:
                return pair
        return plan

    def view(self, request: ValidRequest) -> View:
        constrained = request.sampling.HasField("constraint")
        live = [
            w
            for w in self._workers.live
            if not w.suspect
            and (w.info.constraints or not constrained)
            and w.info.sampling_revision >= request.sampling_revision
        ]
        salts = {"tenant_salt": request.tenant.encode(), "cache_salt": request.cache_salt}
        roots = {fingerprint: chain_root(fingerprint, **salts) for fingerprint in {w.fingerprint for w in live}}
        hashes = {fingerprint: block_hashes(root, request.prompt_ids) for fingerprint, root in roots.items()}
        indexed = {fingerprint: self._index.match(chain) for fingerprint, chain in hashes.items()}
        loads: dict[str, Load] = {}
        held: dict[str, int] = {}
        for w in live:
            if request.prompt_logprobs is not None:  # what is cached is computed all the same
                loads[w.worker_id] = w.load(0)
                continue
            chain, known = hashes[w.fingerprint], indexed[w.fingerprint]
            loads[w.worker_id] = w.load(w.hits(chain, known.get(w.worker_id, 0)))
            held[w.worker_id] = known.get(w.worker_id, 0) * HASH_BLOCK
        output = min(float(request.tokens_to_come), self._output_tokens)
        previous = self._sessions.get(request.session_id) if request.session_id else None
        ask = Ask(
            len(request.prompt_ids), request.n, len(request.prompt_ids) + request.sampling.max_tokens, output, previous,
            self._prefill_ms, goes_on=bool(request.prior), one_token=request.is_one_token,
        )  # fmt: skip
        able = {name: load for name, load in loads.items() if load.is_made_for(ask)}
        if any(load.can_decode or load.ends(ask) for load in able.values()):  # else a worker says why not
            loads = able
        held = {name: tokens for name, tokens in held.items() if name in loads}
        return View(ask, loads, Fetches(ask, loads, held, self.links, self.breakers.allows), roots, hashes)

    def plans(
        self, view: View, avoid: Set[str] = frozenset(), refused: Set[str] = frozenset(), alone: bool = False
    ) -> list[Plan]:
        """As `place`, best first; the policy chooses among the best of them."""
        loads = [load for load in view.loads.values() if load.worker_id not in refused]
        kept = [load for load in loads if load.worker_id not in avoid]
        for some, allows in ((kept, self.breakers.allows), (loads, self.breakers.allows), (loads, anything)):
            pool = Pool.of(some, view.ask, allows, view.fetching, alone)
            if plans := self.policy.plans(view.ask, pool, self.links):
                return plans
        return []

    def predict(self, view: View, plan: Plan) -> Prediction:
        decode, computing = view.loads[plan.decode], view.computing(plan)
        if plan.prefill is None:
            return predict(view.ask, None, computing, self.links)
        return predict(view.ask, computing, decode, self.links)

    def _bind(self, request: ValidRequest, view: View, plan: Plan) -> Placed[W]:
        decode = self._workers.get(plan.decode)
        prefill = self._workers.get(plan.prefill) if plan.prefill is not None else None
        assert decode is not None
        assert plan.prefill is None or prefill is not None
        self._note(request, prefill, decode)
        computing = view.computing(plan)
        compute, fingerprint = to_compute(view.ask, computing), decode.fingerprint
        computing_ms = computing.model.prefill_ms(*compute)
        self._prefill_ms += _EWMA * (computing_ms - self._prefill_ms) if self._prefill_ms else computing_ms
        holder = self._workers.get(computing.fetch.holder) if computing.fetch else None
        held = view.ask.prompt_tokens + request.n
        hashes = view.hashes[fingerprint]
        for worker in filter(None, (prefill, decode)):
            self._index.placed(worker.worker_id, hashes)
        return Placed(
            prefill,
            decode,
            view.roots[fingerprint],
            self.predict(view, plan),
            Booking(*compute, hashes=hashes),
            Booking(*(compute if prefill is None else (0, 0)), held, request.n, hashes),
            holder,
            computing.fetch if holder is not None else None,
            computing.hit_tokens,
        )

    def _note(self, request: ValidRequest, prefill: W | None, decode: W) -> None:
        self._turn += 1
        decode.turn = self._turn
        self.breakers.attempt("decode", decode.worker_id)
        if prefill is not None:
            prefill.turn = self._turn
            self.breakers.attempt("prefill", prefill.worker_id)
            self.breakers.attempt("transfer", prefill.worker_id, decode.worker_id)
        if request.session_id and decode.can_decode:
            self._sessions[request.session_id] = decode.worker_id
            self._sessions.move_to_end(request.session_id)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
