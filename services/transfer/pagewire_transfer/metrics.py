"""What a worker counts about the KV that crosses its lanes."""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class TransferMetrics:
    """One per process; the sender and the receiver of a worker share it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.bytes = Counter(
            "pagewire_kv_transfer_bytes", "KV bytes that crossed a lane", ["direction", "lane"], registry=registry
        )
        self.seconds = Histogram(
            "pagewire_kv_transfer_seconds",
            "First chunk taken to seal acknowledged, at the sender",
            ["lane"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.transfers = Counter(
            "pagewire_kv_transfers", "Transfers by how they ended", ["direction", "outcome"], registry=registry
        )
        self.resends = Counter("pagewire_kv_chunk_resends", "Chunks sent a second time", registry=registry)
        self.checksum_failures = Counter(
            "pagewire_kv_checksum_failures", "Chunks whose bytes did not match their checksum", registry=registry
        )
        self.pairs = Gauge("pagewire_kv_pairs", "Open pairs with other workers", registry=registry)
        self.staging_slots = Gauge(
            "pagewire_kv_staging_slots", "Chunks held between the wire and the pages", registry=registry
        )


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
