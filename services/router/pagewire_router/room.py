"""What the workers can take at once: sequences, prompt tokens to compute, KV to hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pagewire_router.ledger import Ledger

_OVERCOMMIT = 1.25  # sequences admitted per decode slot: the next prompt is computed while a slot empties
_AHEAD_S = 0.5  # of work that waits at a worker which computes prompts, so that it never idles...
_MIN_AHEAD_TOKENS = 4096  # ... and two full steps; the rest waits here, where its order can still change
_DEFAULT_SEQUENCES = 128
UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class Room:
    """All workers together but for `kv_tokens` (now) and `kv_pool` (ever), which one decode worker has at most, and
    `num_waiting`, requests at the one that has fewest of them.
    """

    sequences: int = UNBOUNDED
    prompt_tokens: int = UNBOUNDED
    kv_tokens: int = UNBOUNDED
    kv_pool: int = UNBOUNDED
    num_waiting: int = 0
    num_prefill: int = 1


def room_of(workers: Iterable[Ledger]) -> Room:
    """Without decode workers there are no bounds: requests wait for a worker then, not for each other."""
    workers = list(workers)
    decoding = [w for w in workers if w.can_decode]
    if not decoding:
        return Room()
    prefilling = [w for w in workers if w.can_prefill] or decoding
    return Room(
        sequences=int(_OVERCOMMIT * sum(w.stats.max_num_seqs or _DEFAULT_SEQUENCES for w in decoding)),
        prompt_tokens=sum(map(_ahead_tokens, prefilling)),
        kv_tokens=max(w.free_kv_tokens for w in decoding),
        kv_pool=max(int(w.stats.total_blocks) * w.info.block_size for w in decoding),
        num_waiting=min(int(w.stats.num_waiting) for w in decoding),
        num_prefill=len(prefilling),
    )


def _ahead_tokens(worker: Ledger) -> int:
    ms_per_token = worker.stats.step_cost.prefill_ms_per_token
    return max(_MIN_AHEAD_TOKENS, int(1000 * _AHEAD_S / ms_per_token) if ms_per_token else 0)
