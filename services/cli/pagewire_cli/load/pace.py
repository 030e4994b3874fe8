"""When requests are sent: a fixed number in flight, or arrivals at a rate."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from pagewire_cli.load.client import Outcome

Send = Callable[[int], Coroutine[Any, Any, Outcome]]


def indices(num_requests: int | None, duration_s: float | None) -> Iterator[int]:
    """0, 1, ... until `num_requests` are taken or, from now, `duration_s` has passed."""
    end = time.perf_counter() + duration_s if duration_s is not None else float("inf")
    numbers = itertools.count() if num_requests is None else iter(range(num_requests))
    return itertools.takewhile(lambda _: time.perf_counter() < end, numbers)


async def keep_in_flight(concurrency: int, numbers: Iterator[int], send: Send) -> list[Outcome]:
    """A closed loop: the next request is sent when one of `concurrency` has ended."""
    outcomes: list[Outcome] = []

    async def client() -> None:
        for index in numbers:
            outcomes.append(await send(index))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return outcomes


async def arrive_at(
    rate: float, seed: int, numbers: Iterator[int], send: Send, burstiness: float = 1.0, limit: int | None = None
) -> list[Outcome]:
    """An open loop: `rate` requests per second, whatever the server does.

    At most `limit` are in flight; what arrives then waits at the client, and does not count as begun.
    """
    gate = asyncio.Semaphore(limit) if limit else contextlib.nullcontext()

    async def arrived(index: int) -> Outcome:
        async with gate:
            return await send(index)

    rng = random.Random(f"{seed}/arrivals")
    arrival = time.perf_counter()
    tasks: list[asyncio.Task[Outcome]] = []
    async with asyncio.TaskGroup() as group:
        for index in numbers:
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            tasks.append(group.create_task(arrived(index)))
            arrival += gap(rng, rate, burstiness)
    return [task.result() for task in tasks]


def gap(rng: random.Random, rate: float, burstiness: float) -> float:
    """Seconds between two arrivals: a gamma distribution of shape `burstiness`. 1: a Poisson process; less: bursts."""
    return rng.gammavariate(burstiness, 1 / (rate * burstiness))
