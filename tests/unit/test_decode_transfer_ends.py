"""What the end of an incoming transfer waits for, says and leaves."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ROOT, assert_empty, make_engine
from pagewire_core.errors import Cancelled
from pagewire_decode import transfers as module
from pagewire_decode.transfers import Transfers
from pagewire_engine.engine import Engine
from tiny_models import make_model

PROMPT = list(range(5, 55))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path: Path = make_model(tmp_path_factory.mktemp("llama"), "llama")
    return make_engine(path)


async def test_pages_are_not_given_back_while_they_are_written(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be another prompt's."""
    transfers, name, cache = Transfers(engine), os.urandom(16), engine.runner.cache
    transfers.reserve(name, PROMPT, ROOT, 1)
    await transfers.bind(name, 0, 50)
    writes, goes_on, scatter = threading.Event(), threading.Event(), cache.scatter_checked

    def halting(*args: Any) -> int:
        writes.set()
        goes_on.wait(20)
        return scatter(*args)

    monkeypatch.setattr(cache, "scatter_checked", halting)
    writing = asyncio.create_task(
        asyncio.to_thread(transfers.scatter, name, (0, 3), (0, 50), torch.ones(3, 2, 50, 1, 16))
    )
    await asyncio.to_thread(writes.wait, 20)
    threading.Timer(0.1, goes_on.set).start()
    transfers.end(name, Cancelled("test"))
    assert goes_on.is_set()
    await writing
    assert_empty(engine)


async def test_the_prefill_side_is_told_of_an_end_once_and_why(engine: Engine) -> None:
    transfers, name = Transfers(engine), os.urandom(16)
    told: list[tuple[bytes, str]] = []
    transfers.abort_peer = lambda transfer_id, error: told.append((transfer_id, error.message))
    transfers.reserve(name, PROMPT, ROOT, 1)
    assert transfers.end(name, Cancelled("the first")) and not transfers.end(name, Cancelled("the second"))
    assert told == [(name, "the first")]


@pytest.mark.parametrize(("most", "lasting_s", "kept"), [(3, 60.0, 3), (100, 0.0, 1)])
async def test_what_has_ended_is_remembered_for_a_while_and_up_to_a_number(
    most: int, lasting_s: float, kept: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_TOMBSTONES", most)
    monkeypatch.setattr(module, "TOMBSTONE_S", lasting_s)
    transfers = Transfers(engine)
    names = [os.urandom(16) for _ in range(10)]
    for name in names:
        transfers.end(name, Cancelled("test"))
        await asyncio.sleep(0.001)
    assert list(transfers._tombstones) == names[-kept:]
