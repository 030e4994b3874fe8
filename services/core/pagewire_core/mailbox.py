"""A queue with one reader, for what arrives token by token."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """First in first out, within the event loop that makes it.

    It holds at most `limit` items. One more, and all are dropped; `overflow` is called, which puts the last one.
    asyncio.Queue looks up the running loop whenever it waits, which in Python 3.11 is a system call.
    """

    def __init__(self, limit: int, overflow: Callable[[], None]) -> None:
        self._limit, self._overflow = limit, overflow
        self._overflown = False
        self._items: deque[T] = deque()
        self._loop = asyncio.get_running_loop()
        self._arrival: asyncio.Future[None] | None = None  # what the reader waits for

    def put(self, item: T) -> None:
        if len(self._items) >= self._limit:
            self._drop()
            return
        self._items.append(item)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _drop(self) -> None:
        if not self._overflown:
            self._overflown = True
            self._limit = 1
            self._items.clear()
            self._overflow()

    @property
    def is_awaited(self) -> bool:
        """Whether the reader waits, having taken all that was put."""
        return self._arrival is not None and not self._arrival.done()

    async def get(self) -> T:
        """The oldest item; waits for one. One task at a time."""
        while not self._items:
            self._arrival = self._loop.create_future()
            await self._arrival
        return self._items.popleft()
