"""When a prompt is refused tells who has no room for it: a router passes over that worker, and no other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from engines import ROOT
from kv_endpoints import until
from pagewire.v1 import common_pb2, decode_pb2, prefill_pb2
from pagewire_core.errors import Cancelled, InvalidRequest, Overloaded, PagewireError, Unavailable
from pagewire_decode.transfers import Transfers
from pagewire_engine.model_runner import Launched
from pagewire_prefill.source import PromptSource
from peers import Peer, hand_over, peer
from tiny_models import make_model


@pytest_asyncio.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Peer, Peer]]:
    model = make_model(tmp_path, "llama")
    async with peer(model, "source") as source, peer(model, "target") as target:
        yield source, target
        await source.assert_empty()
        await target.assert_empty()


@pytest.fixture
def going(pair: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The prefill worker's steps end when it is set."""
    runner, go = pair[0].engine.runner, threading.Event()
    launch = runner.launch

    def launched(batch: Any) -> Launched:
        go.wait(20)
        return launch(batch)

    monkeypatch.setattr(runner, "launch", launched)
    yield go
    go.set()


async def reserved(target: Peer) -> prefill_pb2.PrefillRequest:
    """A prompt that the other worker has promised room for."""
    ids: dict[str, Any] = {"transfer_id": os.urandom(16), "prompt_ids": range(5, 25), "cache_root": ROOT}
    promise = await target.decode.Reserve(decode_pb2.ReserveRequest(**ids), None)  # type: ignore[arg-type]
    return prefill_pb2.PrefillRequest(
        **ids, request_id="test", sampling=common_pb2.SamplingParams(max_tokens=4, seed=1),
        decode_address=promise.kv_address, decode_instance=promise.instance,
    )  # fmt: skip


async def until_refused(
    source: Peer, target: Peer, error: type[PagewireError] = Overloaded, then: Callable[[], None] = lambda: None
) -> list[str | None]:
    """What the prefill worker tells before it tells of the refusal. then: what happens after each of that."""
    request = await reserved(target)
    told = []
    with pytest.raises(error):
        async with contextlib.aclosing(source.prefill.Prefill(request, None)) as events:  # type: ignore[arg-type, type-var]
            async for event in events:
                told.append(event.WhichOneof("event"))
                then()
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


async def test_what_is_handed_over_ends_before_it_is_computed(pair: tuple[Peer, Peer], going: threading.Event) -> None:
    source, target = pair
    assert await until_refused(source, target, Unavailable, then=source.prefill.hand_over) == ["started"]


@pytest.mark.parametrize(
    "fields",
    [{"transfer_id": b"short"}, {"decode_address": ""}, {"decode_local_tokens": 3}],
    ids=["transfer", "address", "tokens"],
)
async def test_a_prompt_that_could_not_be_handed_over_is_not_computed(
    pair: tuple[Peer, Peer], fields: dict[str, Any]
) -> None:
    asked = {"transfer_id": os.urandom(16), "decode_address": "127.0.0.1:1", "prompt_ids": [5, 6]} | fields
    with pytest.raises(InvalidRequest):
        await anext(pair[0].prefill.Prefill(prefill_pb2.PrefillRequest(**asked), None))  # type: ignore[arg-type, call-overload]


async def test_blocks_of_a_prompt_whose_call_has_ended_stay_while_its_last_chunk_is_read(
    pair: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    reached, over, gather = threading.Event(), threading.Event(), PromptSource.gather

    def halting(self: PromptSource, *args: Any) -> None:
        reached.set()
        over.wait(20)
        gather(self, *args)

    monkeypatch.setattr(PromptSource, "gather", halting)
    asking = asyncio.create_task(hand_over(range(5, 55), source, target))
    assert await asyncio.to_thread(reached.wait, 20)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: not source.sender.open_transfers)
    assert source.engine.blocks.num_held and source.prefill.num_calls == 1
    over.set()


async def test_a_prompt_by_the_id_of_another_is_refused_and_takes_nothing_from_it(
    pair: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was still to be sent of the first was read from the blocks of the second, while it had any."""
    source, target = pair
    expected = (await hand_over(range(5, 55), source, target)).tokens
    for worker in pair:
        worker.engine.reset_prefix_cache()
    in_use, over, gather = asyncio.Queue[bytes](), threading.Event(), PromptSource.gather
    loop = asyncio.get_running_loop()

    def halting(self: PromptSource, transfer_id: bytes, *args: Any) -> int:
        loop.call_soon_threadsafe(in_use.put_nowait, transfer_id)
        over.wait(20)
        return gather(self, transfer_id, *args)

    monkeypatch.setattr(PromptSource, "gather", halting)
    first = asyncio.create_task(hand_over(range(5, 55), source, target))
    second = prefill_pb2.PrefillRequest(
        transfer_id=await in_use.get(), prompt_ids=range(105, 155), cache_root=ROOT, request_id="test",
        sampling=common_pb2.SamplingParams(max_tokens=4), decode_address="127.0.0.1:1",
    )  # fmt: skip
    with pytest.raises(InvalidRequest, match="in use"):
        await anext(source.prefill.Prefill(second, None))  # type: ignore[arg-type, call-overload]
    over.set()
    assert (await first).tokens == expected
    await until(lambda: second.transfer_id not in source.prefill._source)
    with pytest.raises(Cancelled, match="given back"):
        gather(source.prefill._source, second.transfer_id, (0, 1), (0, 1), torch.empty(0))


@pytest.mark.parametrize("pages", ["bound", "not bound yet"])
async def test_a_client_that_leaves_while_its_prompt_is_computed_leaves_nothing(
    pages: str, pair: tuple[Peer, Peer], going: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer that is open or about to be, and would be waited for as long as one may stand still."""
    source, target = pair
    held, bind = asyncio.Event(), Transfers.bind

    async def holding(self: Transfers, *args: Any) -> None:
        await held.wait()
        await bind(self, *args)

    if pages == "not bound yet":
        monkeypatch.setattr(Transfers, "bind", holding)
    request = await reserved(target)

    async def ask() -> None:
        async with contextlib.aclosing(source.prefill.Prefill(request, None)) as events:  # type: ignore[arg-type, type-var]
            async for _ in events:
                pass

    asking = asyncio.create_task(ask())
    await until(lambda: bool(target.receiver.open_transfers))
    if pages == "bound":
        await until(lambda: bool(target.engine.blocks.num_held))
        await asyncio.sleep(0.1)  # it is told so
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    going.set()
    await until(lambda: not source.prefill.num_calls and not source.engine.blocks.num_held, 3)
    held.set()


async def embedded(worker: Peer) -> list[float]:
    request = prefill_pb2.EmbedPromptRequest(request_id="test", prompt_ids=range(5, 55), cache_root=ROOT)
    return list((await worker.prefill.Embed(request, None)).vector)  # type: ignore[arg-type]


async def test_an_embedding_has_length_one_and_leaves_nothing(pair: tuple[Peer, Peer]) -> None:
    vector = await embedded(pair[0])
    assert sum(x * x for x in vector) == pytest.approx(1.0) and vector == await embedded(pair[1])


@pytest.mark.parametrize("why", ["it refuses", "it hands over", "its caller leaves"])
async def test_an_embedding_that_does_not_come_leaves_nothing(
    pair: tuple[Peer, Peer], going: threading.Event, why: str
) -> None:
    source, _ = pair
    source.prefill.refusing = why == "it refuses"
    asking = asyncio.create_task(embedded(source))
    if not source.prefill.refusing:
        await until(lambda: source.engine.load()["num_running"] == 1)
        assert source.prefill.num_calls == 1
        source.prefill.hand_over() if why == "it hands over" else asking.cancel()
    [error] = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(error, {"it refuses": Overloaded, "it hands over": Unavailable}.get(why, asyncio.CancelledError))
