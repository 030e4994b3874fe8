"""What a plan is made from: workers as the router sees them, their step costs, and what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from pagewire.v1 import common_pb2, worker_pb2

EXPECTED_OUTPUT = 64  # tokens, until requests have shown how much they generate
_CHUNK = 2048  # tokens of a prompt in one step
# Until a worker has measured itself.
_PRIOR_BASE_MS, _PRIOR_MS_PER_TOKEN, _PRIOR_STEP_MS, _PRIOR_MS_PER_SEQUENCE = 5.0, 0.1, 10.0, 0.5


@dataclass(frozen=True)
class StepModel:
    """Milliseconds of a worker's steps. A token that is computed after c others attends to c of them.

    t_pre(n, c) = prefill_base * steps + per_token * n + per_attended * n * (c + n / 2)
    t_dec(B, K) = decode_base + per_sequence * B + per_kv_token * K
    """

    prefill_base_ms: float = _PRIOR_BASE_MS
    prefill_ms_per_token: float = _PRIOR_MS_PER_TOKEN
    prefill_ms_per_attended: float = 0.0
    decode_base_ms: float = _PRIOR_STEP_MS
    decode_ms_per_sequence: float = _PRIOR_MS_PER_SEQUENCE
    decode_ms_per_kv_token: float = 0.0

    @classmethod
    def of(cls, cost: worker_pb2.StepCost) -> StepModel:
        """What a worker says of itself; the prior for what it has not measured. Older ones know no attention."""
        measured = StepModel()
        if cost.prefill_base_ms or cost.prefill_ms_per_token:
            prefill = (cost.prefill_base_ms, cost.prefill_ms_per_token, cost.prefill_ms_per_attended)
        else:
            prefill = (measured.prefill_base_ms, measured.prefill_ms_per_token, 0.0)
        if cost.decode_base_ms or cost.decode_ms_per_sequence:
            decode = (cost.decode_base_ms, cost.decode_ms_per_sequence, cost.decode_ms_per_kv_token)
        else:
            decode = (measured.decode_base_ms, measured.decode_ms_per_sequence, 0.0)
        return cls(*prefill, *decode)

    def prefill_ms(self, tokens: int, cached: int = 0) -> float:
        """One prompt's `tokens` after `cached` ones, on a worker that does nothing else."""
        return self.prefill_work_ms(tokens, tokens * (cached + tokens / 2))

    def prefill_work_ms(self, tokens: int, attended: float) -> float:
        if tokens <= 0:
            return 0.0
        steps = 1 + (tokens - 1) // _CHUNK
        return (
            self.prefill_base_ms * steps + self.prefill_ms_per_token * tokens + self.prefill_ms_per_attended * attended
        )

    def decode_ms(self, sequences: int, kv_tokens: int) -> float:
        return (
            self.decode_base_ms
            + self.decode_ms_per_sequence * sequences
            + self.decode_ms_per_kv_token * kv_tokens
        )  # fmt: skip


@dataclass(frozen=True)
class Fetch:
    """Leading prompt tokens that a worker gets from `holder` in `ms`, instead of computing them in `saved_ms`."""

    holder: str
    tokens: int
    ms: float
    saved_ms: float


@dataclass(frozen=True)
class Load:
    """One worker as a plan sees it: its last report plus what the router sent since."""

    worker_id: str
    role: int  # common_pb2.WorkerRole
    fingerprint: bytes
    model: StepModel = StepModel()
    hit_tokens: int = 0  # leading prompt tokens that it has
    waiting_tokens: int = 0  # prompt tokens to compute, cached ones left out
    waiting_attended: float = 0.0  # and the tokens that they attend to, added up
    num_waiting: int = 0
    num_sequences: int = 0  # running and on the way
    kv_tokens: int = 0  # of these sequences
    max_num_seqs: int = 0  # 0: not known
    max_model_len: int = 0  # 0: not known
    free_tokens: int = 1 << 40
    unused_tokens: int = 1 << 40  # of these, the room that holds no cached prefix
    kv_bytes_per_token: int = 0
    turn: int = 0  # the number of the last placement on it
    fetch: Fetch | None = None  # what it had better fetch if it is to compute the prompt
    one_token: bool = False  # whether, though it only computes prompts, it serves requests for one token alone

    @property
    def can_prefill(self) -> bool:
        return self.role in (common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_BOTH)

    @property
    def can_decode(self) -> bool:
        return self.role in (common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH)

    def ends(self, ask: Ask) -> bool:
        """Whether it has all of the answer when it has computed the prompt, and need not hand it over."""
        return ask.one_token and self.one_token and self.can_prefill and self._seats(ask.n)

    @cached_property
    def queue_ms(self) -> float:
        """Until all prompts that are here are computed."""
        return self.model.prefill_work_ms(self.waiting_tokens, self.waiting_attended)

    def has_room(self, ask: Ask) -> bool:
        return self._seats(self.num_sequences + ask.n) and ask.prompt_tokens + ask.n <= self.free_tokens

    def is_made_for(self, ask: Ask) -> bool:
        """Whether it can serve the request at all, whatever it has to do now: others may run more or longer ones."""
        length = ask.most_tokens if self.can_decode else ask.prompt_tokens
        return (not self.max_model_len or length <= self.max_model_len) and (not self.can_decode or self._seats(ask.n))

    def _seats(self, sequences: int) -> bool:
        return not self.max_num_seqs or sequences <= self.max_num_seqs


@dataclass(frozen=True)
class Ask:
    """What a plan is for. `previous`: the decode worker of the session's last request."""

    prompt_tokens: int
    n: int = 1
    most_tokens: int = 0  # of the prompt and the longest output that it may have
    output_tokens: float = EXPECTED_OUTPUT  # of each choice, as far as one can tell
    previous: str | None = None
    usual_prefill_ms: float = 0.0  # of the prompts before it; 0: not known
    goes_on: bool = False  # after output of which the decode worker computes the last tokens itself
    one_token: bool = False  # of each choice: who computes the prompt has all of the answer


# (leg, workers) -> whether it may be tried
Allows = Callable[..., bool]


def anything(leg: str, *workers: str) -> bool:
    return True


def as_it_is(worker: Load) -> Load:
    return worker


@dataclass(frozen=True)
class Pool:
    """The workers that a request may be placed on."""

    prefill: Sequence[Load]
    decode: Sequence[Load]
    allows: Allows = anything
    fetching: Callable[[Load], Load] = as_it_is  # a worker with what it had better fetch if it computes the prompt
    ending: Set[str] = frozenset()  # of those that decode, who hands nothing over: see Load.ends
    alone: bool = False  # nobody computes a prompt for another worker

    @classmethod
    def of(
        cls,
        loads: Sequence[Load],
        ask: Ask,
        allows: Allows = anything,
        fetching: Callable[[Load], Load] = as_it_is,
        alone: bool = False,
    ) -> Pool:
        """Decode workers without room are left out unless none has any. Who can end the request counts as one."""
        prefill = [w for w in loads if w.can_prefill and allows("prefill", w.worker_id)]
        able = [*(w for w in loads if w.can_decode), *(w for w in prefill if w.ends(ask) and not w.can_decode)]
        decode = [w for w in able if allows("decode", w.worker_id)]
        decode = [w for w in decode if w.has_room(ask)] or decode
        return cls(prefill, decode, allows, fetching, frozenset(w.worker_id for w in decode if w.ends(ask)), alone)

    @cached_property
    def prefill_queues(self) -> tuple[int, int]:
        """Requests that wait at a prefill worker, the least and the most."""
        return _extremes(w.num_waiting for w in self.prefill)

    @cached_property
    def decode_queues(self) -> tuple[int, int]:
        return _extremes(w.num_waiting for w in self.decode)

    def sources(self, d: Load, ranked: Sequence[Load] | None = None) -> Iterator[Load]:
        """Prefill workers that may compute a prompt for decode worker `d`, in the order of `ranked`."""
        if self.alone or not d.can_decode:
            return
        for p in self.prefill if ranked is None else ranked:
            same_kv = p.worker_id != d.worker_id and p.fingerprint == d.fingerprint
            if same_kv and self.allows("transfer", p.worker_id, d.worker_id):
                yield p

    def has_source(self, d: Load) -> bool:
        return next(self.sources(d), None) is not None


def _extremes(values: Iterable[int]) -> tuple[int, int]:
    found = sorted(values)
    return (found[0], found[-1]) if found else (0, 0)
