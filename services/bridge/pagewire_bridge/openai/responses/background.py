"""Responses that go on without the client that asked for them, and are found in the store by whoever asks later.

One that is cancelled or deleted, at whichever bridge, has lost its lease, and ends here within TICK_S. One that Redis
has lost is stored again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any

import structlog
from pagewire_core.errors import Internal, InvalidRequest, PagewireError, Unavailable

from pagewire_bridge.generation import Generation
from pagewire_bridge.openai.responses.answer import encoded, error_event, events, is_last, last_event
from pagewire_bridge.openai.responses.asked import Asked, store_of
from pagewire_bridge.openai.responses.items import Fields
from pagewire_bridge.openai.responses.store import ResponseStore

log = structlog.get_logger(__name__)

TICK_S = 0.2
_NUM_TRIES, _RETRY_S = 10, 1.0  # to store an end


class BackgroundRuns:
    """All of this bridge."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, run: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(run)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """What still runs has failed, and is stored as that."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class BackgroundRun:
    """One response. Life: `begin`, then `run` to its end, which also closes the generation.

    opening: of the generation, which may have to wait.
    """

    def __init__(self, asked: Asked, generation: Generation, opening: asyncio.Task[None]) -> None:
        self.answer = asked.answer()
        self._asked, self._generation, self._opening = asked, generation, opening
        self._store = store_of(asked.request)
        self._name = (asked.tenant, asked.response_id)
        self._untold: list[bytes] = []
        self._num_told = 0
        if opening.done():
            asked.accept(self.answer, generation)
        self._note(self.answer.queue())

    async def begin(self) -> None:
        """Raises Unavailable."""
        await self._store.begin(self._asked.tenant, self._asked.record(self.answer))
        await self._tell()

    async def run(self) -> None:
        work = asyncio.create_task(self._work())
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=TICK_S)
                if not await self._is_wanted():
                    return
            if error := work.exception():
                log.error("background response failed in the bridge", exc_info=error)
                self._note(self.answer.fail(Internal("The server failed; its log has the reason.")))
            await self._end(num_tries=_NUM_TRIES)
        except asyncio.CancelledError:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if self._asked.record(self.answer).is_running:
                self._note(self.answer.fail(Unavailable("The server was stopped.")))
            await self._end(num_tries=1)
            raise
        finally:
            work.cancel()
            self._opening.cancel()
            await asyncio.gather(work, self._opening, return_exceptions=True)
            await self._generation.close()

    async def _work(self) -> None:
        try:
            await self._opening
        except PagewireError as error:
            self._note(self.answer.fail(error))
            return
        self._asked.accept(self.answer, self._generation)
        self._note(self.answer.begin())
        with contextlib.suppress(Unavailable):
            await self._change()
        async for event in events(self.answer, self._generation):
            self._note([event])

    async def _is_wanted(self) -> bool:
        """Tells what is new, and keeps the lease."""
        try:
            await self._tell()
            return await self._store.go_on(*self._name) or await self._is_stored_again()
        except Unavailable:  # the lease outlives a short absence
            return True

    async def _is_stored_again(self) -> bool:
        """If it is not there, as when Redis was emptied, and nobody has ended it. Raises Unavailable."""
        if not await self._store.is_lost(*self._name):
            return False
        log.warning("background response was lost and is stored again", response=self._asked.response_id)
        await self._store.begin(self._asked.tenant, self._asked.record(self.answer))
        return True

    async def _change(self) -> bool:
        """What is stored; whether nobody has ended it before. Raises Unavailable."""
        tenant, record = self._asked.tenant, self._asked.record(self.answer)
        return await self._store.change(tenant, record) or (
            await self._is_stored_again() and await self._store.change(tenant, record)
        )

    async def _end(self, num_tries: int) -> None:
        """The last event is told when the end is stored: who reads it may go on from there."""
        for _ in range(num_tries):
            try:
                await self._tell()
                if await self._change():
                    self._note([self.answer.last()])
                    await self._tell()
                return
            except Unavailable:
                await asyncio.sleep(_RETRY_S)
        log.warning("background response is lost: it cannot be stored", response=self._asked.response_id)

    def _note(self, new: Iterable[Fields]) -> None:
        if self._asked.body.stream:
            self._untold += map(encoded, new)

    async def _tell(self) -> None:
        if self._untold:
            telling = len(self._untold)
            await self._store.tell(*self._name, self._num_told, self._untold[:telling])
            del self._untold[:telling]
            self._num_told += telling


async def follow(store: ResponseStore, tenant: str, response_id: str, first: int) -> AsyncGenerator[bytes]:
    """The events from this number on, to the last; none if there are not so many."""
    try:
        while True:
            record = await store.find(tenant, response_id)
            before = min(first, 1)  # the event before them is read, too: it may be the last
            told = await store.told(tenant, response_id, first - before)
            for event in told[before:]:
                yield event
            first += len(told[before:])
            if told and is_last(told[-1]):
                return
            if record is None:
                raise InvalidRequest("This response is not kept any more.")
            if not record.is_running:  # who ran it may not be there to tell the last; all before is told and read
                if len(told) >= before:
                    yield encoded(last_event(record.response, first))
                elif not await store.told(tenant, response_id, 0):
                    raise InvalidRequest("The events of this response are not kept any more.", "stream")
                return
            await asyncio.sleep(TICK_S)
    except (InvalidRequest, Unavailable) as error:
        yield encoded(error_event(error, first))
