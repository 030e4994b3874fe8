"""Whether a prompt's beginning is fetched from a worker that has it, instead of computed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from heapq import nlargest
from zlib import crc32

from pagewire_router.links import Links
from pagewire_router.load import Allows, Ask, Fetch, Load, anything

_BASE_MS = 10.0  # to ask, to open the transfer, to seal it; more where a worker is busy
_HOLDERS = 4  # that have most of it are asked about: a common prefix may be everywhere
_MARGIN = 1.5  # by how much fetching must be cheaper: its time is no better known


class Fetches:
    """Workers as one request finds them, each with what it had better fetch before it computes the prompt, if anything.

    held: leading tokens of the prompt that workers have now; what is only on its way to them cannot be fetched.
    A worker is judged when a plan would have it compute: among hundreds few are asked.
    """

    def __init__(
        self, ask: Ask, loads: Mapping[str, Load], held: Mapping[str, int], links: Links, allows: Allows = anything
    ) -> None:
        self._ask, self._held, self._links, self._allows = ask, held, links, allows
        # Of equals each prompt asks others: one that all asked would be slow.
        most = nlargest(
            _HOLDERS,
            (name for name, tokens in held.items() if tokens),
            key=lambda name: (held[name], crc32(f"{ask.prompt_tokens} {name}".encode())),
        )
        self._holders = [loads[name] for name in most]
        self._found: dict[str, Load] = {}

    def __call__(self, worker: Load) -> Load:
        found = self._found.get(worker.worker_id)
        if found is None:
            best = max(filter(None, map(partial(self._fetch, worker), self._holders)), key=_gain, default=None)
            found = self._found[worker.worker_id] = replace(worker, fetch=best) if best else worker
        return found

    def _fetch(self, worker: Load, holder: Load) -> Fetch | None:
        """None unless it is clearly cheaper than computing the same tokens."""
        tokens = self._held[holder.worker_id]
        if holder.worker_id == worker.worker_id or tokens <= worker.hit_tokens:
            return None
        if holder.fingerprint != worker.fingerprint or not self._allows("transfer", holder.worker_id, worker.worker_id):
            return None
        num_bytes = (tokens - worker.hit_tokens) * worker.kv_bytes_per_token
        fetch_ms = _BASE_MS + self._links(holder.worker_id, worker.worker_id).transfer_ms(num_bytes)
        saved_ms = _compute_ms(self._ask, worker, worker.hit_tokens) - _compute_ms(self._ask, worker, tokens)
        return Fetch(holder.worker_id, tokens, fetch_ms, saved_ms) if fetch_ms * _MARGIN < saved_ms else None


def _gain(fetch: Fetch) -> float:
    return fetch.saved_ms - fetch.ms


def _compute_ms(ask: Ask, worker: Load, hit: int) -> float:
    hit = min(hit, ask.prompt_tokens - 1)
    return worker.model.prefill_ms(ask.prompt_tokens - hit, hit)
