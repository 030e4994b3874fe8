"""How fast KV moves between pairs of workers: measured, and a prior before."""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT = 0.3  # of a new measurement in the moving averages
_MIN_BYTES = 64 << 10  # smaller transfers measure latency
_SAME_HOST = (1000 / 2e9, 0.5)  # milliseconds per byte, milliseconds
_OTHER_HOST = (1000 / 500e6, 2.0)


@dataclass
class Link:
    ms_per_byte: float
    round_trip_ms: float

    def transfer_ms(self, num_bytes: int) -> float:
        return self.round_trip_ms + self.ms_per_byte * num_bytes


class Links:
    """By pair of a prefill and a decode worker. `join` tells where a worker is."""

    def __init__(self) -> None:
        self._hosts: dict[str, str] = {}
        self._links: dict[tuple[str, str], Link] = {}

    def join(self, worker_id: str, address: str) -> None:
        """A worker is there, perhaps a new one of that name: what was measured of it is forgotten."""
        self.leave(worker_id)
        self._hosts[worker_id] = address.rpartition(":")[0]

    def leave(self, worker_id: str) -> None:
        self._hosts.pop(worker_id, None)
        self._links = {pair: link for pair, link in self._links.items() if worker_id not in pair}

    def __call__(self, prefill: str, decode: str) -> Link:
        return self._links.get((prefill, decode)) or self._prior(prefill, decode)

    def observe(self, prefill: str, decode: str, num_bytes: int, seconds: float) -> None:
        """A transfer kept the wire busy for so long.

        A pair's first opens its lane and allocates: it says nothing of the next (85 ms between two workers on a GPU,
        where the next took 4), and a pair that looks slow is not tried again.
        """
        if seconds <= 0:
            return
        link = self._links.get((prefill, decode))
        if link is None:
            self._links[prefill, decode] = self._prior(prefill, decode)
            return
        if num_bytes < _MIN_BYTES:
            link.round_trip_ms += _WEIGHT * (1000 * seconds - link.round_trip_ms)
            return
        moving_ms = max(1000 * seconds - link.round_trip_ms, 500 * seconds)
        link.ms_per_byte += _WEIGHT * (moving_ms / num_bytes - link.ms_per_byte)

    def _prior(self, prefill: str, decode: str) -> Link:
        here, there = self._hosts.get(prefill), self._hosts.get(decode)
        return Link(*(_SAME_HOST if here is not None and here == there else _OTHER_HOST))
