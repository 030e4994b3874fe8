"""Workers of both roles that compute prompts for each other, with less room than all of them would take."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from kv_endpoints import until
from pagewire_core.errors import Cancelled, Overloaded
from pagewire_core.tasks import all_of
from pagewire_decode import transfers
from peers import Peer, compute, hand_over, peer
from tiny_models import make_model

PROMPTS = [[5 + i] * 170 for i in range(4)]  # of 11 blocks
ROOM = 384 * 16 * 26  # 26 blocks: two prompts and their next tokens


def gated(step: Callable[[], bool], go: threading.Event) -> Callable[[], bool]:
    return lambda: go.wait() and step()


def slowed(step: Callable[[], bool], over: threading.Event) -> Callable[[], bool]:
    """Until it is over."""
    return lambda: over.wait(0.05) is None or step()


@contextlib.asynccontextmanager
async def two_workers(path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> AsyncIterator[tuple[Peer, Peer]]:
    """Each has `room` bytes of KV, keeps no prefixes, and looks at its promises often."""
    monkeypatch.setattr(transfers, "LOOK_S", 0.1)
    model = make_model(path, "llama")
    async with (
        peer(model, "a", kv_cache_memory_bytes=room, enable_prefix_caching=False) as a,
        peer(model, "b", kv_cache_memory_bytes=room, enable_prefix_caching=False) as b,
    ):
        yield a, b


async def answered(prompt: list[int], source: Peer, target: Peer) -> list[int]:
    """A router asks again where there was no room."""
    while True:
        try:
            return (await hand_over(prompt, source, target)).tokens
        except (Overloaded, Cancelled):
            await asyncio.sleep(0.05)


async def crossed(a: Peer, b: Peer) -> asyncio.Task[list[list[int]]]:
    """The answers to all prompts, every other one's the other way round, once room is promised for each."""
    pairs = [(a, b), (b, a)] * 2
    calls = asyncio.create_task(all_of(answered(prompt, *pair) for prompt, pair in zip(PROMPTS, pairs, strict=True)))
    await until(lambda: a.engine.external.reserved == b.engine.external.reserved == 24, 5)
    return calls


async def test_two_workers_full_of_promises_to_each_others_queues_do_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_workers(tmp_path, monkeypatch, ROOM) as (a, b):
        expected = [(await compute(prompt, a)).tokens for prompt in PROMPTS]
        go = threading.Event()
        for worker in (a, b):
            worker.engine.step = gated(worker.engine.step, go)  # type: ignore[method-assign]
        calls = await crossed(a, b)
        go.set()
        assert await asyncio.wait_for(calls, 30) == expected
        for worker in (a, b):
            await worker.assert_empty()


@pytest.mark.parametrize(("num_blocks", "before"), [(34, 1), (36, 100)], ids=["too few blocks", "enough in the end"])
async def test_what_runs_is_not_waited_for_beside_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_blocks: int, before: int
) -> None:
    """One long answer on each worker, and nobody's prompt was computed before these had ended.

    24 blocks are promised, and a prompt takes 11: with what the answer gives back there are 10, or 12.
    """
    async with two_workers(tmp_path, monkeypatch, 384 * 16 * num_blocks) as (a, b):
        expected = [(await compute(prompt, a)).tokens for prompt in PROMPTS]
        go, over = threading.Event(), threading.Event()
        for worker in (a, b):
            worker.engine.step = slowed(worker.engine.step, over)  # type: ignore[method-assign]
        long = [asyncio.create_task(compute([9] * before, worker, max_tokens=120)) for worker in (a, b)]
        await until(lambda: all(worker.engine.load()["num_running"] == 1 for worker in (a, b)), 5)
        for worker in (a, b):
            worker.engine.step = gated(worker.engine.step, go)  # type: ignore[method-assign]
        calls = await crossed(a, b)
        go.set()
        with contextlib.ExitStack() as ending:
            ending.callback(over.set)
            assert await asyncio.wait_for(calls, 30) == expected
            assert not any(task.done() for task in long)
        for task in long:
            await task
        for worker in (a, b):
            await worker.assert_empty()


async def test_workers_that_compute_for_each_other_and_for_themselves_get_through_a_crowd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each promised its pages to claims, while its queue held what the other's claims waited for: they stood still."""
    async with two_workers(tmp_path, monkeypatch, ROOM) as (a, b):
        crowd = random.Random(1)

        async def served(number: int) -> None:
            prompt, source, target = [5 + number] * crowd.choice([20, 170, 230]), *crowd.choice([(a, b), (b, a)])
            if crowd.random() < 0.5:
                await compute(prompt, target)
            else:
                await answered(prompt, source, target)

        await asyncio.wait_for(all_of(served(number) for number in range(40)), 30)
        for worker in (a, b):
            await worker.assert_empty()
