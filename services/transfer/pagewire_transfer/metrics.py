"""What a worker counts about the KV that crosses its lanes."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_RATES = (1e7, 3e7, 1e8, 2e8, 4e8, 8e8, 1.5e9, 3e9, 6e9, 1e10, 2e10, 4e10)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class TransferMetrics:
    """One per process; the sender and the receiver of a worker share it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.bytes = Counter(
            "pagewire_kv_transfer_bytes", "KV bytes that crossed a lane", ["direction", "lane"], registry=registry
        )
        self.seconds = Histogram(
            "pagewire_kv_transfer_seconds",
            "Time in which a transfer had something to send or on its way, at the sender",
            ["lane"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.tail_seconds = Histogram(
            "pagewire_kv_tail_seconds",
            "First token to seal acknowledged: what the hand-off adds after the prompt is computed",
            ["lane"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.overlap = Histogram(
            "pagewire_kv_overlap_ratio",
            "Share of a transfer's time that was hidden behind the computation of its prompt",
            ["lane"],
            buckets=[i / 10 for i in range(11)],
            registry=registry,
        )
        self.rate = Histogram(
            "pagewire_kv_transfer_bytes_per_second",
            "Bytes of a transfer by its time",
            ["lane"],
            buckets=_RATES,
            registry=registry,
        )
        self.transfers = Counter(
            "pagewire_kv_transfers", "Transfers by how they ended", ["direction", "outcome"], registry=registry
        )
        for direction in ("sent", "received"):
            for outcome in ("ok", "TransferLost"):  # there from the start, so that the first one is an increase
                self.transfers.labels(direction, outcome)
        self.resends = Counter("pagewire_kv_chunk_resends", "Chunks sent a second time", registry=registry)
        self.checksum_failures = Counter(
            "pagewire_kv_checksum_failures", "Chunks whose bytes did not match their checksum", registry=registry
        )
        self.pairs = Gauge("pagewire_kv_pairs", "Open pairs with other workers", registry=registry)
        self.staging_slots = Gauge(
            "pagewire_kv_staging_slots", "Chunks held between the wire and the pages", registry=registry
        )

    def sent(self, lane: str, num_bytes: int, transfer_us: int, tail_us: int, overlap: float) -> None:
        """One transfer that was sealed; an empty one has nothing to hide."""
        self.seconds.labels(lane=lane).observe(transfer_us / 1e6)
        self.tail_seconds.labels(lane=lane).observe(tail_us / 1e6)
        if num_bytes and transfer_us:
            self.overlap.labels(lane=lane).observe(overlap)
            self.rate.labels(lane=lane).observe(num_bytes * 1e6 / transfer_us)


class StagingSlots:
    """Counts the chunks one side holds outside its pages. Thread-safe.

    A slot is given back when the lane operation on it has ended, however long after the transfer that is.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._lock = threading.Lock()
        self._held = 0

    @property
    def held(self) -> int:
        return self._held

    def take(self) -> None:
        self._add(1)

    def give_back(self) -> None:
        self._add(-1)

    def _add(self, change: int) -> None:
        with self._lock:
            self._held += change
        self._gauge.inc(change)
