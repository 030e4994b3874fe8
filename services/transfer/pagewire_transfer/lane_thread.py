"""The thread of one pair: every blocking call of its lane runs there, in the order of submission."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pagewire_transfer.lanes import Lane, open_lane
from pagewire_transfer.relay_store import RelayStore

_COLLECT_S = 0.5  # by then whoever waited for the pair has heard of its end

P = ParamSpec("P")
T = TypeVar("T")


class LaneThread:
    """One lane and the thread it lives on.

    `put` sends a StorePut to the peer; it is called on the event loop, what the peer puts goes to
    `store.receive`. All methods are for the event-loop thread and none blocks.
    """

    def __init__(self, put: Callable[[str, bytes], None], timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.store = RelayStore(lambda key, value: _ignore(loop.call_soon_threadsafe(put, key, value)), timeout_s)
        self._timeout_s = timeout_s
        self._lane: Lane | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-lane")
        self._last: Future[None] | None = None

    @property
    def lane(self) -> Lane:
        """The open lane; to be used by submitted calls only."""
        assert self._lane is not None
        return self._lane

    def open(self, name: str, rank: int, host: str, epoch: int) -> Future[None]:
        """Opens this side of the lane; fails with Unavailable."""
        return self.submit(self._open, name, rank, host, epoch)

    def _open(self, name: str, rank: int, host: str, epoch: int) -> None:
        self._lane = open_lane(name, self.store, rank, host, epoch, self._timeout_s)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._executor.submit(call, *args, **kwargs)

    def close(self) -> None:
        """Ends what runs as soon as can be, then the lane, then the thread. Once."""
        self.store.close()
        if self._lane is not None:
            self._lane.interrupt()
        self._last = self.submit(self._close)
        self._executor.shutdown(wait=False)

    def _close(self) -> None:
        if self._lane is not None:
            self._lane.close()

    async def closed(self) -> None:
        """Returns when nothing runs any more. After `close`."""
        assert self._last is not None
        await settled(self._last)
        # Errors and the frames in their tracebacks refer to each other and to what the pair had: its connection, 32 MiB
        # of mapped memory. In a server that makes little garbage it could be hours until that is found.
        asyncio.get_running_loop().call_later(_COLLECT_S, gc.collect)


def _ignore(_: object) -> None:
    return None


async def settled(job: Future[T]) -> None:
    """Waits for a submitted call to end, however it ends, and never cancels it."""
    future = asyncio.wrap_future(job)
    await asyncio.wait([future])
    if not future.cancelled():
        future.exception()  # whoever awaits the result reports it
