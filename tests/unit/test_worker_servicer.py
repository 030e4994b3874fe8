"""What a worker says of itself, to whoever asks it."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields
from typing import Any

import pytest
from pagewire.v1 import common_pb2, worker_pb2
from pagewire_engine.options import EngineOptions
from pagewire_worker.main import _options
from pagewire_worker.servicer import WorkerServicer
from prometheus_client import CollectorRegistry

_SERVICER = "pagewire_worker.servicer."


class Scene:
    """A servicer whose worker has this load, these blocks and this role."""

    def __init__(self, hashes: Sequence[bytes] = ()) -> None:
        self.num_running, self.role = 0, common_pb2.WORKER_ROLE_BOTH
        self.servicer = WorkerServicer(
            worker_pb2.InfoResponse(worker_id="w", role=common_pb2.WORKER_ROLE_PREFILL),
            lambda: worker_pb2.StatsResponse(num_running=self.num_running),
            lambda: (7, list(hashes)),
            CollectorRegistry(),
            self,  # type: ignore[arg-type]
            lambda: 0,
            self._unready,
        )

    async def _unready(self) -> None:
        pass

    def stats(self) -> AsyncIterator[worker_pb2.StatsResponse]:
        return self._called("Stats")

    async def snapshot(self) -> list[worker_pb2.SnapshotResponse]:
        return [part async for part in self._called("Snapshot")]

    def _called(self, method: str) -> Any:
        return getattr(self.servicer, method)(None, None)


async def test_load_is_told_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_SERVICER + "_POLL_S", 0.001)
    monkeypatch.setattr(_SERVICER + "_AT_LEAST_EVERY_S", 1000.0)
    s = Scene()
    told = s.stats()
    assert (await anext(told)).num_running == 0
    s.num_running = 3
    assert (await anext(told)).num_running == 3


async def test_load_that_stays_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers take a worker that says nothing for one whose loop stands still."""
    monkeypatch.setattr(_SERVICER + "_POLL_S", 0.001)
    monkeypatch.setattr(_SERVICER + "_AT_LEAST_EVERY_S", 0.01)
    told = Scene().stats()
    assert [(await anext(told)).num_running for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(("num_blocks", "parts"), [(0, [0]), (10_000, [10_000]), (25_000, [10_000, 10_000, 5000])])
async def test_a_snapshot_comes_in_parts_that_fit_a_message(num_blocks: int, parts: list[int]) -> None:
    hashes = [number.to_bytes(32, "big") for number in range(num_blocks)]
    told = await Scene(hashes).snapshot()
    assert [len(part.hashes) for part in told] == parts and {part.sequence for part in told} == {7}
    assert [block for part in told for block in part.hashes] == hashes


async def test_a_worker_tells_the_role_that_it_has_now() -> None:
    s = Scene()
    told = await s.servicer.Info(None, None)  # type: ignore[arg-type]
    assert (told.worker_id, told.role) == ("w", common_pb2.WORKER_ROLE_BOTH)


def test_each_option_of_the_engine_comes_from_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGEWIRE_POISON_FREE_BLOCKS", raising=False)
    flags = {option.name: object() for option in fields(EngineOptions)} | {"poison_free_blocks": False}
    options = _options(argparse.Namespace(**flags))
    assert {name: getattr(options, name) for name in flags} == flags
