"""When a prompt is refused tells who has no room for it: a router passes over that worker, and no other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from engines import ROOT
from pagewire.v1 import common_pb2, decode_pb2, prefill_pb2
from pagewire_core.errors import Cancelled, Overloaded
from peers import Peer, peer
from tiny_models import make_model


@pytest_asyncio.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Peer, Peer]]:
    model = make_model(tmp_path, "llama")
    async with peer(model, "source") as source, peer(model, "target") as target:
        yield source, target
        await source.assert_empty()
        await target.assert_empty()


async def until_refused(source: Peer, target: Peer) -> list[str | None]:
    """What the prefill worker tells before it tells of the refusal."""
    ids: dict[str, Any] = {"transfer_id": os.urandom(16), "prompt_ids": range(5, 25), "cache_root": ROOT}
    reserved = await target.decode.Reserve(decode_pb2.ReserveRequest(**ids), None)  # type: ignore[arg-type]
    sampling = common_pb2.SamplingParams(max_tokens=4, seed=1)
    request = prefill_pb2.PrefillRequest(
        **ids, request_id="test", sampling=sampling, decode_address=reserved.kv_address,
        decode_instance=reserved.instance,
    )  # fmt: skip
    told = []
    with pytest.raises(Overloaded):
        async with contextlib.aclosing(source.prefill.Prefill(request, None)) as events:  # type: ignore[arg-type, type-var]
            async for event in events:
                told.append(event.WhichOneof("event"))
    target.transfers.end(request.transfer_id, Cancelled("the test is over"))
    return told


async def test_a_prefill_worker_refuses_before_it_begins(pair: tuple[Peer, Peer]) -> None:
    source, target = pair
    source.prefill.refusing = True
    assert await until_refused(source, target) == []


async def test_a_decode_worker_without_pages_refuses_after_that(
    pair: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bind(*_: object) -> None:
        raise Overloaded("out of KV blocks")

    source, target = pair
    monkeypatch.setattr(target.transfers, "bind", bind)
    assert (await until_refused(source, target))[0] == "started"
