"""How fast KV moves between pairs of workers: measured, and a prior before."""

from __future__ import annotations

_DECAY = 0.8  # of what was measured, with every new measurement
_PRIOR = 0.001  # the weight of either transfer that the prior is taken to be
_PRIOR_MIB = 16
_SAME_HOST = (0.5, 2e9)  # milliseconds, bytes per second
_OTHER_HOST = (2.0, 500e6)

Sums = tuple[float, float, float, float, float]  # of weights, and times x, x x, t, x t


class Link:
    """Milliseconds t of a transfer as a line over its MiB x: least squares over the last few, and a prior.

    Small transfers measure latency and large ones bandwidth; but what is small differs by orders of magnitude between
    a GPU's memory and a slow network, so all are fitted together.
    """

    def __init__(self, latency_ms: float, bytes_per_s: float) -> None:
        nothing, much = (0.0, latency_ms), (_PRIOR_MIB, latency_ms + 1e3 * _PRIOR_MIB * 2**20 / bytes_per_s)
        self._prior = _added(_added((0.0,) * 5, *nothing, _PRIOR), *much, _PRIOR)
        self._measured: Sums = (0.0,) * 5
        self._base, self._slope = self._line()

    def observe(self, num_bytes: int, milliseconds: float) -> None:
        n, x, xx, t, xt = self._measured
        faded = (_DECAY * n, _DECAY * x, _DECAY * xx, _DECAY * t, _DECAY * xt)
        self._measured = _added(faded, num_bytes / 2**20, milliseconds, 1.0)
        self._base, self._slope = self._line()

    def transfer_ms(self, num_bytes: int) -> float:
        return self._base + self._slope * num_bytes / 2**20

    def _line(self) -> tuple[float, float]:
        """Milliseconds of nothing, and for each MiB; neither is less than 0."""
        n, x, xx, t, xt = (a + b for a, b in zip(self._prior, self._measured, strict=True))
        slope = (n * xt - x * t) / (n * xx - x * x)
        base = (t - slope * x) / n
        if slope < 0:
            return t / n, 0.0
        if base < 0:
            return 0.0, xt / xx
        return base, slope


def _added(sums: Sums, x: float, t: float, weight: float) -> Sums:
    n, sx, sxx, st, sxt = sums
    return n + weight, sx + weight * x, sxx + weight * x * x, st + weight * t, sxt + weight * x * t


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
        """To be asked; `observe` is how it learns."""
        return self._links.get((prefill, decode)) or _PRIORS[self._on_one_host(prefill, decode)]

    def observe(self, prefill: str, decode: str, num_bytes: int, seconds: float) -> None:
        """A transfer kept the wire busy for so long.

        A pair's first opens its lane and allocates: it says nothing of the next (85 ms between two workers on a GPU,
        where the next took 4), and a pair that looks slow is not tried again.
        """
        if seconds <= 0:
            return
        link = self._links.get((prefill, decode))
        if link is None:
            self._links[prefill, decode] = _prior(self._on_one_host(prefill, decode))
            return
        link.observe(num_bytes, 1000 * seconds)

    def _on_one_host(self, prefill: str, decode: str) -> bool:
        here = self._hosts.get(prefill)
        return here is not None and here == self._hosts.get(decode)


def _prior(one_host: bool) -> Link:
    return Link(*(_SAME_HOST if one_host else _OTHER_HOST))


# What is asked of every pair that has not been measured: among hundreds of workers that is nearly all.
_PRIORS = {one_host: _prior(one_host) for one_host in (False, True)}
