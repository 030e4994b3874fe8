"""Who may start: a bounded queue, first in first out, in front of the workers' capacity."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from pagewire_core.errors import DeadlineExceeded, Overloaded, Unavailable

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_EWMA = 0.1


class Admission:
    """Counts running sequences against `capacity()` and keeps at most `max_queued` requests waiting.

    `capacity` may change at any time; call `wake` then. A request heavier than the whole capacity runs
    alone.
    """

    def __init__(self, max_queued: int, capacity: Callable[[], int]) -> None:
        self._max_queued = max_queued
        self._capacity = capacity
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._load = 0
        self._closed = False
        self._service_s = 1.0  # moving average of how long a request runs
        self.num_running = 0

    @property
    def num_queued(self) -> int:
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def slot(self, num_sequences: int, deadline: float) -> AsyncIterator[None]:
        """Holds room for `num_sequences` while the body runs; `deadline` is on the loop's clock.

        Raises Overloaded (with retry_after_s) when the queue is full, DeadlineExceeded, and Unavailable
        after `close`. Cancelling a waiting caller takes it out of the queue.
        """
        await self._enter(num_sequences, deadline)
        started = time.monotonic()
        try:
            yield
        finally:
            self._service_s += _EWMA * (time.monotonic() - started - self._service_s)
            self._load -= num_sequences
            self.num_running -= 1
            self.wake()

    def close(self) -> None:
        """Refuses new and waiting requests; running ones go on."""
        self._closed = True
        while self._waiting:
            _, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(_closing())

    def wake(self) -> None:
        """Lets in what fits now."""
        while self._waiting:
            weight, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
            elif self._fits(weight):
                self._waiting.popleft()
                self._take(weight)
                turn.set_result(None)
            else:
                return

    async def _enter(self, weight: int, deadline: float) -> None:
        if self._closed:
            raise _closing()
        if not self._waiting and self._fits(weight):
            self._take(weight)
            return
        if len(self._waiting) >= self._max_queued:
            raise Overloaded("too many requests are waiting; try again later", retry_after_s=self._retry_after_s())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (weight, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except TimeoutError:
            self._withdraw(entry)
            raise DeadlineExceeded("the request waited for its turn until its time was over") from None
        except asyncio.CancelledError:
            self._withdraw(entry)
            raise

    def _withdraw(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        weight, turn = entry
        if not turn.cancelled() and turn.done() and turn.exception() is None:
            self._load -= weight  # it was let in at the moment it gave up
            self.num_running -= 1
        with contextlib.suppress(ValueError):
            self._waiting.remove(entry)
        self.wake()

    def _fits(self, weight: int) -> bool:
        return self._load == 0 or self._load + weight <= self._capacity()

    def _take(self, weight: int) -> None:
        self._load += weight
        self.num_running += 1

    def _retry_after_s(self) -> float:
        """When the queue should have moved by a quarter, from how long requests run."""
        rate = max(1, self.num_running) / max(self._service_s, 0.01)
        return min(max(len(self._waiting) / 4 / rate, _MIN_RETRY_S), _MAX_RETRY_S)


def _closing() -> Unavailable:
    return Unavailable("the router is shutting down; try again", retry_after_s=_MIN_RETRY_S)
