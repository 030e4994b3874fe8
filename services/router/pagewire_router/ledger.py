"""What a worker last said of its load, and what was sent to it since."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from pagewire.v1 import common_pb2, worker_pb2
from pagewire_core.block_hash import HASH_BLOCK

from pagewire_router.load import Load, StepModel

_SUSPECT_S = 3.0  # reports come every second
_REPORT_DELAY_S = 0.05  # a report this young may have been made before a booking reached the worker


@dataclass(eq=False)
class Booking:
    """Work on its way to a worker: tokens to compute after cached ones, tokens of KV to hold, sequences to run.

    hashes: of the blocks that the worker will have when it is done.
    """

    compute_tokens: int = 0
    cached_tokens: int = 0
    kv_tokens: int = 0
    num_sequences: int = 0
    hashes: Sequence[bytes] = ()
    at: float = field(default=0.0, init=False)  # when it was booked


class Ledger:
    """One worker's account; `clock` is in seconds."""

    def __init__(self, info: worker_pb2.InfoResponse, clock: Callable[[], float] = time.monotonic) -> None:
        self.info = info
        self.worker_id, self.fingerprint = info.worker_id, info.fingerprint
        self._block_size, self._kv_bytes_per_token = info.block_size, info.kv_bytes_per_token
        self.stats = worker_pb2.StatsResponse()
        self.model = StepModel()
        self.turn = 0  # number of the last placement on it, which books it
        self._clock = clock
        self._stats_at = 0.0
        self._bookings: dict[Booking, None] = {}
        self._coming: Counter[bytes] = Counter()
        self._cold: Load | None = None  # without a hit, as long as nothing changes

    @property
    def role(self) -> common_pb2.WorkerRole:
        """It may change; workers of before do not say so."""
        return self.stats.role or self.info.role

    @property
    def can_decode(self) -> bool:
        return self.role in (common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH)

    @property
    def can_prefill(self) -> bool:
        return self.role in (common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_BOTH)

    @property
    def free_kv_tokens(self) -> int:
        """Tokens that its free blocks hold, without what is on its way to it."""
        return int(self.stats.free_blocks) * self._block_size - sum(b.kv_tokens for b in self._unreported)

    @property
    def _unreported(self) -> list[Booking]:
        since = self._stats_at - _REPORT_DELAY_S
        return list(takewhile(lambda booking: booking.at > since, reversed(self._bookings)))

    @property
    def suspect(self) -> bool:
        """It has been silent for too long to be given anything new."""
        return self._clock() - self._stats_at > _SUSPECT_S

    @property
    def is_booked(self) -> bool:
        return bool(self._bookings)

    def report(self, stats: worker_pb2.StatsResponse) -> None:
        self.stats = stats
        self.model = StepModel.of(stats.step_cost)
        self._stats_at = self._clock()
        self._cold = None

    @contextlib.contextmanager
    def booked(self, booking: Booking) -> Iterator[None]:
        """Counts work against this worker until it reports it itself, at the longest while the body runs."""
        booking.at = self._clock()
        self._bookings[booking] = None
        self._cold = None
        self._coming.update(booking.hashes)
        try:
            yield
        finally:
            del self._bookings[booking]
            self._cold = None
            for value in booking.hashes:
                self._coming[value] -= 1
                if not self._coming[value]:
                    del self._coming[value]

    def hits(self, hashes: Sequence[bytes], indexed: int) -> int:
        """Leading blocks that the worker has, `indexed` of them as it said, or will have when all is done."""
        while indexed < len(hashes) and hashes[indexed] in self._coming:
            indexed += 1
        return indexed

    def load(self, hit_blocks: int) -> Load:
        """As a request finds it that has so many leading blocks here."""
        cold = self._cold = self._cold or self._without_hit()
        return replace(cold, hit_tokens=hit_blocks * HASH_BLOCK) if hit_blocks else cold

    def _without_hit(self) -> Load:
        unreported = self._unreported
        stats, block_size = self.stats, self._block_size
        booked_kv = sum(b.kv_tokens for b in unreported)
        free = int(stats.free_blocks) * block_size - booked_kv
        return Load(
            worker_id=self.worker_id,
            role=self.role,
            fingerprint=self.fingerprint,
            model=self.model,
            waiting_tokens=stats.waiting_prefill_tokens + sum(b.compute_tokens for b in unreported),
            waiting_attended=stats.waiting_prefill_attended
            + sum(b.compute_tokens * (b.cached_tokens + b.compute_tokens / 2) for b in unreported),
            num_waiting=stats.num_waiting + len(unreported),
            num_sequences=stats.num_running
            + stats.num_waiting
            + stats.waiting_transfers
            + sum(b.num_sequences for b in unreported),
            kv_tokens=stats.running_kv_tokens + booked_kv,
            max_num_seqs=stats.max_num_seqs,
            max_model_len=self.info.max_model_len,
            free_tokens=free,
            unused_tokens=max(free - int(stats.cached_blocks) * block_size, 0),
            kv_bytes_per_token=self._kv_bytes_per_token,
            turn=self.turn,
            one_token=self.info.one_token,
        )
