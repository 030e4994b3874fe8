"""Who may start: a bounded, fair queue in front of what the workers can take.

The queue is here and not at the workers, because order can be changed only here. A worker that computes
prompts is given little ahead, a decode worker what its free blocks hold; see `room`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from pagewire_core.errors import DeadlineExceeded, Overloaded, PagewireError

from pagewire_router.drain_rate import DrainRate
from pagewire_router.fair_queue import FairQueue, Waiting
from pagewire_router.room import UNBOUNDED, Room

_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_STANDS_S = 1.0  # how long the first in the queue waits here for free blocks
_FIRST_GUESS_S = 2.0  # how long a full queue takes to move before anything was seen to leave it


@dataclass(frozen=True)
class Limits:
    """Of the queue. max_tokens: prompt tokens for each worker that computes prompts."""

    max_requests: int
    max_tokens: int = 1 << 40


class _Load:
    """What runs, in the units of a Room."""

    def __init__(self) -> None:
        self.requests = 0
        self.sequences = 0
        self.uncomputed = 0  # prompt tokens
        self.entering = 0  # KV tokens of requests that the workers' own numbers do not have yet


@dataclass(eq=False)
class Slot(Waiting):
    """A request's place in the queue, and then among those that run.

    n: its sequences; 0: its prompt is only computed, and takes no room of those that decode. deadline: on the loop's
    clock.
    """

    n: int = 1
    deadline: float = float("inf")
    turn: asyncio.Future[None] | None = None  # while it waits
    stands_since: float | None = None  # as the first, for want of free blocks alone
    _admission: Admission | None = None  # while it runs
    _uncomputed: int = 0
    _entering: int = 0

    @property
    def kv_tokens(self) -> int:
        return self.tokens + self.n if self.n else 0

    def begin(self, admission: Admission) -> None:
        load, self._admission = admission.load, admission
        self._uncomputed, self._entering = self.tokens, self.kv_tokens
        load.requests += 1
        load.sequences += self.n
        load.uncomputed += self._uncomputed
        load.entering += self._entering

    def placed(self, compute_tokens: int) -> None:
        """It is on its way to workers, which will compute so many of its tokens."""
        if self._admission is not None:
            self._reduce(min(self._uncomputed, compute_tokens))

    def generated(self, num_tokens: int) -> None:
        """It gave so many tokens; with the first, its prompt is computed."""
        if self._admission is not None:
            self._admission.charge(self, num_tokens)
            if self._uncomputed:
                self._reduce(0)

    def end(self) -> None:
        """Gives its room back. Idempotent."""
        if self._admission is not None:
            self._admission.load.requests -= 1
            self._admission.load.sequences -= self.n
            self._reduce(0)
            self._admission = None

    def _reduce(self, uncomputed: int) -> None:
        assert self._admission is not None
        self._admission.load.uncomputed -= self._uncomputed - uncomputed
        self._admission.load.entering -= self._entering
        self._uncomputed, self._entering = uncomputed, 0
        self._admission.wake()


class Admission:
    """Lets requests in as long as `room()` has room for them, in the order of a FairQueue.

    Where the next one waits for room to decode, those that do not decode pass it, in the order of their coming.
    The room may change at any time; call `wake` then, and every second. A request heavier than the whole room runs
    alone.
    """

    def __init__(self, limits: Limits, room: Callable[[], Room]) -> None:
        self.load = _Load()
        self._limits = limits
        self._room = room
        self._queue = FairQueue()
        self._passing: dict[Slot, None] = {}  # of those that wait, who does not decode
        self._rate = DrainRate()

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def max_requests(self) -> int:
        """That run and wait, if each has one choice and little of a prompt."""
        running = self._room().sequences
        return self._limits.max_requests + (running if running < UNBOUNDED else 0)

    @property
    def queued_tokens(self) -> int:
        return self._queue.tokens

    @property
    def num_running(self) -> int:
        return self.load.requests

    @contextlib.asynccontextmanager
    async def slot(self, slot: Slot) -> AsyncIterator[None]:
        """Holds room for the request while the body runs, which says what becomes of it.

        Raises Overloaded (with retry_after_s) when the queue is full of what is more entitled to be in it and
        DeadlineExceeded when the deadline comes or is bound to come first.
        Cancelling a waiting caller takes it out of the queue.
        """
        await self._enter(slot)
        try:
            yield
        finally:
            slot.end()

    def wake(self) -> None:
        """Lets in what fits now."""
        while (slot := self._queue.next()) is not None:
            assert isinstance(slot, Slot) and slot.turn is not None
            if not slot.turn.done() and not self._fits(slot):
                slot = next(iter(self._passing), slot)
            turn = slot.turn
            assert turn is not None
            if turn.done():  # its caller gives up at this moment
                self._take_out(slot)
            elif self._fits(slot):
                self._queue.take(slot)
                self._passing.pop(slot, None)
                self._rate.left(slot.tokens, _now())
                turn.set_result(None)
                slot.turn = None
                slot.begin(self)
            else:
                return
        self._rate.empty()

    def charge(self, slot: Slot, num_tokens: int) -> None:
        """A running request has generated tokens."""
        if self._queue:
            self._queue.charge(slot, num_tokens)

    async def _enter(self, slot: Slot) -> None:
        if _now() >= slot.deadline:
            raise DeadlineExceeded("the request's time was over before it began")
        if not self._queue and self._fits(slot):
            slot.begin(self)
            return
        turn = self._queue_up(slot)
        if not slot.n:
            self.wake()
        try:
            async with asyncio.timeout_at(slot.deadline):
                await turn
        except BaseException as error:
            if slot.turn is not None:
                self._take_out(slot)
                self.wake()
            else:
                slot.end()  # it was let in at the moment it gave up
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request waited for its turn until its time was over") from None
            raise

    def _queue_up(self, slot: Slot) -> asyncio.Future[None]:
        now = _now()
        wait_s = self._rate.seconds_for(self._queue.ahead_of(slot), now)
        if slot.n and wait_s is not None and now + wait_s > slot.deadline:
            raise DeadlineExceeded(
                f"the request cannot begin in time: what waits before it takes about {wait_s:.0f} s; "
                "try again later or allow more time"
            )
        slot.turn = turn = asyncio.get_running_loop().create_future()
        self._rate.waits(now)
        self._queue.put(slot)
        if not slot.n:
            self._passing[slot] = None
        while len(self._queue) > 1 and self._is_too_long():
            self._refuse(self._queue.shed(), self._overloaded())
            self.wake()  # the next in order may fit where the one that was refused did not
        return turn

    def _is_too_long(self) -> bool:
        limits = self._limits
        too_many = len(self._queue) > limits.max_requests
        return too_many or self._queue.tokens > limits.max_tokens * self._room().num_prefill

    def _refuse(self, slot: Waiting, error: PagewireError) -> None:
        assert isinstance(slot, Slot) and slot.turn is not None
        turn = slot.turn
        self._take_out(slot)
        if not turn.done():
            turn.set_exception(error)
            turn.exception()  # its caller may give up at this moment and never look at it

    def _take_out(self, slot: Slot) -> None:
        self._queue.remove(slot)
        self._passing.pop(slot, None)
        slot.turn = None

    def _fits(self, slot: Slot) -> bool:
        load = self.load
        if not load.requests:
            return True
        room = self._room()
        if load.uncomputed >= room.prompt_tokens:
            return False
        if not slot.n:
            return True
        if load.sequences + slot.n > room.sequences:
            return False
        return min(slot.kv_tokens, room.kv_pool) <= room.kv_tokens - load.entering or self._goes_ahead(slot, room)

    def _goes_ahead(self, slot: Slot, room: Room) -> bool:
        """Whether it had better wait at a worker, where those of all routers go in order.

        Here it waits beside routers that know nothing of it, and have every block that becomes free before there are
        enough. One goes at a time, and only where nobody waits already.
        """
        now = _now()
        if slot.stands_since is None:
            slot.stands_since = now
        return now >= slot.stands_since + _STANDS_S and not (self.load.entering or room.num_waiting)

    def _overloaded(self) -> Overloaded:
        """To be tried again when the queue should have moved by a quarter, at the rate at which it moves now."""
        wait_s = self._rate.seconds_for(self._queue.tokens // 4, _now())
        retry_after_s = min(max(_FIRST_GUESS_S if wait_s is None else wait_s, _MIN_RETRY_S), _MAX_RETRY_S)
        return Overloaded("too many requests are waiting; try again later", retry_after_s=retry_after_s)


def _now() -> float:
    return asyncio.get_running_loop().time()
