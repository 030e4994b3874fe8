"""Whether a prompt's beginning is fetched from a worker that has it, instead of computed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from heapq import nlargest
from zlib import crc32

from pagewire_router.links import Links
from pagewire_router.load import Allows, Ask, Fetch, Load

_BASE_MS = 10.0  # to ask, to open the transfer, to seal it; more where a worker is busy
_HOLDERS = 4  # that have most of it are asked about: a common prefix may be everywhere
_MARGIN = 1.5  # by how much fetching must be cheaper: its time is no better known


def with_fetches(
    ask: Ask,
    loads: Mapping[str, Load],
    held: Mapping[str, int],
    links: Links,
    allows: Allows = lambda leg, *workers: True,
) -> dict[str, Load]:
    """The workers, each with what it had better fetch before it computes the prompt, if anything.

    held: leading tokens of the prompt that workers have now; what is only on its way to them cannot be fetched.
    """
    # Of equals each prompt asks others: one that all asked would be slow.
    most = nlargest(
        _HOLDERS,
        (name for name, tokens in held.items() if tokens),
        key=lambda name: (held[name], crc32(f"{ask.prompt_tokens} {name}".encode())),
    )
    holders = [loads[name] for name in most]

    def best(worker: Load) -> Fetch | None:
        found = [
            _fetch(ask, worker, holder, held[holder.worker_id], links)
            for holder in holders
            if holder.worker_id != worker.worker_id
            and holder.fingerprint == worker.fingerprint
            and allows("transfer", holder.worker_id, worker.worker_id)
        ]
        return max(filter(None, found), key=lambda fetch: fetch.saved_ms - fetch.ms, default=None)

    if not holders:
        return dict(loads)
    fetches = {name: best(load) for name, load in loads.items()}
    return {name: replace(load, fetch=fetches[name]) if fetches[name] else load for name, load in loads.items()}


def _fetch(ask: Ask, worker: Load, holder: Load, tokens: int, links: Links) -> Fetch | None:
    """None unless it is clearly cheaper than computing the same tokens."""
    num_bytes = (tokens - worker.hit_tokens) * worker.kv_bytes_per_token
    if num_bytes <= 0:
        return None
    fetch_ms = _BASE_MS + links(holder.worker_id, worker.worker_id).transfer_ms(num_bytes)
    saved_ms = _compute_ms(ask, worker, worker.hit_tokens) - _compute_ms(ask, worker, tokens)
    if fetch_ms * _MARGIN >= saved_ms:
        return None
    return Fetch(holder.worker_id, tokens, fetch_ms, saved_ms)


def _compute_ms(ask: Ask, worker: Load, hit: int) -> float:
    hit = min(hit, ask.prompt_tokens - 1)
    return worker.model.prefill_ms(ask.prompt_tokens - hit, hit)
