"""One try of a request on one pair of workers: both legs, merged into one stream of events.

    Reserve(D) -> Decode(D) stream  --+--> events, in the order they arrive
               -> Prefill(P) stream --+
    local plan:   Decode(D) alone, with local_prefill

The decode leg's tokens come over the worker's feed if one is open, else on the leg's own stream. From
the feed they go to `take` at once where nothing is before them: waking the request's task for every
token would cost more than the token. The end of the leg's own stream is the attempt's end. The prefill
leg may fail without harm once the decode worker has said DecodeStarted, for then it holds everything.
However an attempt ends, both calls are over and the decode worker has been told when it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Literal, Self

import grpc
from pagewire.v1 import common_pb2, decode_pb2, prefill_pb2
from pagewire_core.errors import DeadlineExceeded, Overloaded, PagewireError, TransferLost, Unavailable, from_rpc
from pagewire_core.feed import FeedCall
from pagewire_core.mailbox import Mailbox
from pagewire_core.rpc import request_metadata
from pagewire_core.slow_reader import MAX_UNREAD, too_slow

from pagewire_router.placement import Placed
from pagewire_router.request import ValidRequest
from pagewire_router.spans import AttemptSpans
from pagewire_router.workers import Worker

Leg = Literal["reserve", "prefill", "decode"]
TimeUp = Literal["request", "kv", "account"]  # of what the time is up
Event = prefill_pb2.PrefillResponse | decode_pb2.DecodeResponse | decode_pb2.FeedEntry
Arrival = tuple[Leg, Event | PagewireError | None] | TimeUp | Exception
Take = Callable[[decode_pb2.FeedEntry], bool]

_TOO_LONG = "the request took longer than it may"
_NO_TOKENS = decode_pb2.FeedEntry()
_RESERVE_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 2.0
INDEX_DELAY_S = 1.0  # how long the index may take to hear of blocks; until then a booking tells of them
_KV_SENT_TIMEOUT_S = 0.5  # how long a finished request waits for the prefill worker's account of it


class LegFailed(Exception):
    """A leg ended before its time; `error` says why. `worker_id`: who failed, or had no room."""

    def __init__(self, leg: Leg, worker_id: str, error: PagewireError) -> None:
        super().__init__(f"{leg} on {worker_id}: {error.message}")
        self.leg = leg
        self.worker_id = worker_id
        self.error = error


class Attempt:
    """An async context manager: `reserve`, then iterate `events` once; both raise LegFailed.

    The work counts against its workers from entering on, against the prefill worker until its leg is over and the
    index knows of its blocks. Raises DeadlineExceeded at `deadline`, on the loop's clock. Workers notice a transfer
    that stands still for `transfer_timeout_s`; twice that after the first token the attempt gives up on one that
    nobody ended. `prior` is what the decode worker is to go on after, for each choice, if anything. `take` may be
    given tokens while `events` is waited for; where it returns True, `events` goes on with an entry that has none.
    What it raises comes out of `events`.
    """

    def __init__(
        self,
        request: ValidRequest,
        placed: Placed[Worker],
        deadline: float,
        transfer_timeout_s: float,
        take: Take | None,
        prior: Sequence[decode_pb2.PriorOutput],
        spans: AttemptSpans,
    ) -> None:
        self._request = request
        self.placed = placed
        self._deadline = deadline
        self._transfer_timeout_s = transfer_timeout_s
        self._take = take
        self._prior = prior
        self._spans = spans
        self._metadata = request_metadata(request.request_id, spans.attempt)
        self._arrived: Mailbox[Arrival] = Mailbox(MAX_UNREAD, self._overflow)
        self._held = contextlib.ExitStack()  # the decode worker's booking and the place on the feed
        self._prefill_held = contextlib.ExitStack()  # the prefill worker's booking: it keeps nothing beyond its leg
        self._unbooking: asyncio.TimerHandle | None = None  # of the prefill worker
        self._feed: FeedCall | None = None
        self._calls: dict[Leg, grpc.aio.UnaryStreamCall] = {}
        self._pumps: list[asyncio.Task[None]] = []
        self._reservation: decode_pb2.ReserveResponse | None = None
        self._asked = False  # the decode worker may know of this transfer
        self._computing = False  # the prefill worker has begun
        self.started = False  # the decode worker holds all of the prompt's KV, and knows the choices
        self._finished = False
        # What the decode worker says waits for what the prefill worker says of the prompt: that comes before any token.
        self._waits_for_prompt = request.prompt_logprobs is not None and placed.prefill is not None
        self._early: deque[Arrival] = deque()
        self._timers: dict[TimeUp, asyncio.TimerHandle] = {}
        self.transfer_id = secrets.token_bytes(16)

    async def __aenter__(self) -> Self:
        if self.placed.prefill is not None:
            self._prefill_held.enter_context(self.placed.prefill.booked(self.placed.prefill_booking))
        self._held.enter_context(self.placed.decode.booked(self.placed.decode_booking))
        legs: list[tuple[Leg, Worker | None]] = [("prefill", self.placed.prefill), ("decode", self.placed.decode)]
        for leg, worker in legs:
            if worker is not None:
                self._held.enter_context(worker.watched(partial(self._die, leg)))
        return self

    async def __aexit__(self, _kind: object, failure: BaseException | None, _traceback: object) -> None:
        for timer in self._timers.values():
            timer.cancel()
        leaving = asyncio.ensure_future(self._leave())
        try:
            await asyncio.shield(leaving)
        except asyncio.CancelledError:  # the client leaves at this moment
            await leaving
            raise
        finally:
            if self._unbooking is not None:
                self._unbooking.cancel()
            self._prefill_held.close()
            self._held.close()
            if isinstance(failure, LegFailed):
                self._spans.close(failure.error, failure.leg)
            else:
                self._spans.close(failure)

    async def _leave(self) -> None:
        """Ends both calls, and the whole transfer on the decode worker."""
        for call in self._calls.values():
            call.cancel()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        if self._asked and not self._finished:
            await self.stop_choices(())

    async def reserve(self) -> None:
        """Gets the decode worker's promise of room, if the plan needs one.

        Raises LegFailed ("reserve"), and DeadlineExceeded.
        """
        if self.placed.prefill is None:
            return
        message = decode_pb2.ReserveRequest(
            transfer_id=self.transfer_id,
            prompt_ids=self._request.prompt_ids,
            cache_root=self.placed.cache_root,
            n=self._request.n,
        )
        self._asked = True
        stub, clock = self.placed.decode.decode, asyncio.get_running_loop().time
        timeout_s = min(_RESERVE_TIMEOUT_S, self._deadline - clock())
        try:
            self._reservation = await stub.Reserve(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and timeout_s < _RESERVE_TIMEOUT_S:
                raise DeadlineExceeded(_TOO_LONG) from error
            raise LegFailed("reserve", self.placed.decode.worker_id, from_rpc(error)) from error

    async def events(self) -> AsyncGenerator[Event, None]:
        """Events of both legs until the decode worker has finished."""
        self._asked = True
        self._feed = self._held.enter_context(self.placed.decode.feed.joined(self._arrive, self._arrive))
        self._calls["decode"] = self._open_decode()
        if self._reservation is not None:
            self._calls["prefill"] = self._open_prefill(self._reservation)
        self._pumps = [asyncio.create_task(self._pump(leg, call)) for leg, call in self._calls.items()]
        self._limit("request", self._deadline)
        legs = set(self._calls)
        while legs:
            arrived = await self._next()
            if isinstance(arrived, str):
                self._judge_time(arrived)
                if self._finished:
                    return
                continue
            if isinstance(arrived, Exception):
                raise arrived
            leg, event = arrived
            if event is None or isinstance(event, PagewireError):
                legs.discard(leg)
                self._judge_end(leg, event)
            else:
                self._note(leg, event)
                yield event

    async def _next(self) -> Arrival:
        """What arrived, in order; of the decode leg only what may be told now, or its failure."""
        if self._early and not self._waits_for_prompt:
            return self._early.popleft()
        while True:
            arrived = await self._arrived.get()
            if not (self._waits_for_prompt and isinstance(arrived, tuple) and arrived[0] == "decode"):
                return arrived
            if isinstance(arrived[1], PagewireError):
                return arrived
            self._early.append(arrived)

    async def stop_choices(self, choices: Sequence[int]) -> None:
        """Tells the decode worker that some choices have ended. A lost worker shows on its stream."""
        message = decode_pb2.StopRequest(transfer_id=self.transfer_id, choices=choices)
        with contextlib.suppress(grpc.RpcError):
            await self.placed.decode.decode.Stop(message, timeout=_STOP_TIMEOUT_S, metadata=self._metadata)

    def _open_decode(self) -> grpc.aio.UnaryStreamCall:
        message = decode_pb2.DecodeRequest(
            request_id=self._request.request_id,
            transfer_id=self.transfer_id,
            prompt_ids=self._request.prompt_ids,
            cache_root=self.placed.cache_root,
            sampling=self._request.sampling,
            n=self._request.n,
            local_prefill=self.placed.prefill is None,
            feed_id=self._feed.feed_id if self._feed else b"",
            feed_call=self._feed.number if self._feed else 0,
            prior=self._prior,
            prompt_logprobs=self._request.prompt_logprobs if self.placed.prefill is None else None,
            holder=self._holder() if self.placed.prefill is None else None,
        )
        return self.placed.decode.decode.Decode(message, metadata=self._leg_metadata("decode", self.placed.decode))

    def _open_prefill(self, reservation: decode_pb2.ReserveResponse) -> grpc.aio.UnaryStreamCall:
        assert self.placed.prefill is not None
        message = prefill_pb2.PrefillRequest(
            request_id=self._request.request_id,
            transfer_id=self.transfer_id,
            prompt_ids=self._request.prompt_ids,
            cache_root=self.placed.cache_root,
            sampling=self._request.sampling,
            n=self._request.n,
            decode_address=reservation.kv_address,
            decode_instance=reservation.instance,
            decode_local_tokens=reservation.local_tokens,
            holder=self._holder(),
            prompt_logprobs=self._request.prompt_logprobs,
        )
        return self.placed.prefill.prefill.Prefill(message, metadata=self._leg_metadata("prefill", self.placed.prefill))

    def _leg_metadata(self, leg: Leg, worker: Worker) -> Sequence[tuple[str, str]]:
        return request_metadata(self._request.request_id, self._spans.leg(leg, worker))

    def _holder(self) -> common_pb2.KvHolder | None:
        """Whom the worker that computes the prompt is to ask for its beginning."""
        holder, fetch = self.placed.holder, self.placed.fetch
        if holder is None or fetch is None:
            return None
        return common_pb2.KvHolder(
            worker_id=holder.worker_id, address=holder.info.address, instance=holder.info.instance,
            tokens=fetch.tokens, timeout_s=fetch.saved_ms / 1000,
        )  # fmt: skip

    async def _pump(self, leg: Leg, call: grpc.aio.UnaryStreamCall) -> None:
        """Moves one leg's events to the queue; None marks its good end."""
        feed = self._feed if leg == "decode" else None
        try:
            async for event in call:
                if feed and event.HasField("finished"):
                    await feed.complete(event.finished.feed_entries)
                self._arrived.put((leg, event))
                if feed and event.HasField("started"):
                    feed.begin()
            self._arrived.put((leg, None))
        except grpc.RpcError as error:
            self._arrived.put((leg, from_rpc(error)))
        except PagewireError as error:  # the feed does not bring what the leg's end counts
            self._arrived.put((leg, error))

    def _arrive(self, entry: decode_pb2.FeedEntry | PagewireError) -> None:
        """What the feed brings of the decode leg, or its break, which has lost tokens of it."""
        if self._take is None or isinstance(entry, PagewireError) or not self._arrived.is_awaited:
            self._arrived.put(("decode", entry))
            return
        try:
            if self._take(entry):
                self._arrived.put(("decode", _NO_TOKENS))
        except Exception as error:  # a fault of this request, not of the feed that it shares with others
            self._arrived.put(error)

    def _die(self, leg: Leg, error: PagewireError) -> None:
        """A leg's worker counts as dead, whatever its connection says."""
        self._arrived.put((leg, error))

    def _overflow(self) -> None:
        """Nobody takes the events: the workers stop making them."""
        for call in self._calls.values():
            call.cancel()
        self._arrived.put(too_slow())

    def _note(self, leg: Leg, event: Event) -> None:
        if isinstance(event, decode_pb2.FeedEntry):
            return
        kind = event.WhichOneof("event")
        if leg == "decode":
            self.started = self.started or kind == "started"
            if kind == "finished":
                self._finished = True
                self._limit("account", asyncio.get_running_loop().time() + _KV_SENT_TIMEOUT_S)
        elif kind == "started":
            self._computing = True
        elif kind == "first_tokens":
            self._waits_for_prompt = False
            self._await_kv()

    def _limit(self, what: TimeUp, when: float) -> None:
        """Has `what` arrive at that time, on the loop's clock. One timer each: none for every token."""
        if what not in self._timers:
            self._timers[what] = asyncio.get_running_loop().call_at(when, self._arrived.put, what)

    def _judge_time(self, what: TimeUp) -> None:
        """Raises what becomes of an attempt that is not yet finished."""
        if self._finished:
            return
        if what == "request":
            raise DeadlineExceeded(_TOO_LONG)
        if what == "kv" and not self.started:
            raise self._failed("prefill", TransferLost("the KV transfer stood still"))

    def _judge_end(self, leg: Leg, error: PagewireError | None) -> None:
        """A leg is over: raises LegFailed if the attempt cannot go on without it."""
        self._spans.end_leg(leg, error)
        if leg == "prefill":
            self._unbooking = asyncio.get_running_loop().call_later(INDEX_DELAY_S, self._prefill_held.close)
        if self._finished:
            return
        if leg == "decode":
            raise self._failed(leg, error or Unavailable("it ended its stream early"))
        if error is not None and not self.started:
            raise self._failed(leg, error)
        self._await_kv()

    def _await_kv(self) -> None:
        """From now on the decode worker must say DecodeStarted in time."""
        self._limit("kv", asyncio.get_running_loop().time() + 2 * self._transfer_timeout_s)

    def _failed(self, leg: Leg, error: PagewireError) -> LegFailed:
        """A prefill worker refuses before it begins. From then on it tells that the decode worker has no pages."""
        no_pages = self._computing and isinstance(error, Overloaded)
        worker = self.placed.prefill if leg == "prefill" and not no_pages else None
        return LegFailed(leg, (worker or self.placed.decode).worker_id, error)
