"""The gRPC channel to the router: every call the bridge makes, with failures as PagewireErrors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pagewire.v1 import inference_pb2 as pb
from pagewire.v1 import inference_pb2_grpc as pb_grpc
from pagewire.v1 import worker_pb2
from pagewire_core.errors import (
    ERROR_METADATA_KEY,
    DeadlineExceeded,
    InvalidRequest,
    PagewireError,
    Unavailable,
    from_rpc,
)
from pagewire_core.feed import FeedCall, FeedReader
from pagewire_core.mailbox import Mailbox
from pagewire_core.rpc import MAX_MESSAGE_BYTES, open_channel, request_metadata
from pagewire_core.slow_reader import MAX_UNREAD, too_slow
from pagewire_core.tls import ROUTER, TlsFiles
from starlette.requests import Request

log = structlog.get_logger(__name__)

Event = pb.GenerateResponse | pb.Delta
_Join = Callable[[Callable[[Any], None], Callable[[PagewireError], None]], AbstractContextManager[FeedCall | None]]
_Arrived = pb.GenerateResponse | pb.DeltaFeedEntry | PagewireError | None

QUICK_S = 5.0  # bound on everything but generation
RENEW_S = 5.0  # how often certificates are looked at
# A router that stops cancels calls that it has not begun. By then the channel has another router, if there is one.
_PAUSES_S = (0.02, 0.1, 0.3, 1.0)  # the channel may take a moment to know
_AGAIN = {"maxAttempts": 1 + len(_PAUSES_S), "initialBackoff": "0.02s", "maxBackoff": "1s", "backoffMultiplier": 4,
          "retryableStatusCodes": ["CANCELLED"]}  # fmt: skip
_CUT_OFF = "Cancelling all calls"  # what a server whose time is over says to those that it has seldom overlooked
_SHORT_CALLS = ("ListModels", "Embed", "Tokenize", "Detokenize", "TokenizerInfo", "Metrics", "ServerInfo")
_SERVICE_CONFIG = json.dumps({"methodConfig": [{
    "name": [{"service": "pagewire.v1.InferenceService", "method": method} for method in _SHORT_CALLS],
    "retryPolicy": _AGAIN,
}]})  # fmt: skip


class _RouterStops(Unavailable):
    """The router has cancelled the call: it stops."""


class _Link:
    """One connection to the router, and the feed on it."""

    def __init__(self, channel: grpc.aio.Channel, explain: Callable[[grpc.aio.AioRpcError], PagewireError]) -> None:
        self._channel = channel
        self.stub = pb_grpc.InferenceServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)
        self.feed = FeedReader(
            lambda feed_id: self.stub.DeltaFeed(pb.DeltaFeedRequest(feed_id=feed_id), wait_for_ready=True), explain
        )
        self.feed.open()
        self._num_users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The body has a generation that must not be cut off."""
        self._num_users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._num_users -= 1
            if not self._num_users:
                self._unused.set()

    async def retire(self) -> None:
        """Closes when nothing runs on it any more; nothing new is begun."""
        await asyncio.sleep(QUICK_S)
        await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        await self.feed.close()
        await self._channel.close()


class RouterClient:
    """Calls one router. Make it inside a running event loop.

    address: host:port; timeout_s: what one generation may take in all.
    """

    def __init__(self, address: str, timeout_s: float, tls: TlsFiles | None = None) -> None:
        self._timeout_s = timeout_s
        self._link = _Link(open_channel(address, tls, ROUTER, _SERVICE_CONFIG), self._error)
        self._renewing = asyncio.create_task(self._renew(address, tls)) if tls else None

    @property
    def _stub(self) -> pb_grpc.InferenceServiceStub:
        return self._link.stub

    @property
    def feed_is_open(self) -> bool:
        """Whether a generation that begins now gets its deltas over the feed."""
        return self._link.feed.is_open

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._link.close()

    async def _renew(self, address: str, tls: TlsFiles) -> None:
        """A channel keeps the certificate that it was made with, also when it connects again, long expired."""
        async with asyncio.TaskGroup() as closing:
            shown = tls.read()
            while True:
                await asyncio.sleep(RENEW_S)
                if tls.read() != shown:
                    shown, old = tls.read(), self._link
                    self._link = _Link(open_channel(address, tls, ROUTER, _SERVICE_CONFIG), self._error)
                    closing.create_task(old.retire())
                    log.info("channel to the router made anew, with the certificate that is there now")

    async def generate(self, request: pb.GenerateRequest, timeout_s: float = math.inf) -> AsyncGenerator[Event]:
        """The router's events as they come. Closing the generator cancels the call. Raises PagewireError.

        timeout_s: what the client allows, where that is less than the server does.
        Deltas come over the feed if one is open, and bare; else as responses on the call's own stream. What a router
        that stops has not begun is asked of the next one, without a feed: the one that is open may be the old router's.
        """
        joined: _Join = self._link.feed.joined
        for pause_s in (*_PAUSES_S, None):
            begun = False
            try:
                async with contextlib.aclosing(self._generated(request, timeout_s, joined)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except _RouterStops:
                if begun or pause_s is None:
                    raise
            log.info("asking another router: this one stops", request_id=request.request_id)
            request.ClearField("feed_id")
            joined = _no_feed
            await asyncio.sleep(pause_s)

    async def _generated(self, request: pb.GenerateRequest, timeout_s: float, joined: _Join) -> AsyncGenerator[Event]:
        """One call of the router."""
        if request.ByteSize() > MAX_MESSAGE_BYTES:
            raise InvalidRequest(f"The prompt is larger than {MAX_MESSAGE_BYTES >> 20} MiB; send a shorter one.")
        call: grpc.aio.UnaryStreamCall | None = None

        def overflow() -> None:
            if call is not None:
                call.cancel()
            arrived.put(too_slow())

        arrived: Mailbox[_Arrived] = Mailbox(MAX_UNREAD, overflow)
        link = self._link
        with link.used(), joined(arrived.put, arrived.put) as feed:
            if feed is not None:
                request.feed_id, request.feed_call = feed.feed_id, feed.number
            metadata = request_metadata(request.request_id)
            call = link.stub.Generate(request, timeout=min(self._timeout_s, timeout_s), metadata=metadata)
            pump = asyncio.create_task(self._pump(call, feed, arrived))
            try:
                while (event := await arrived.get()) is not None:
                    if isinstance(event, PagewireError):
                        raise event
                    if isinstance(event, pb.DeltaFeedEntry):
                        for delta in event.deltas:
                            yield delta
                    else:
                        yield event
            finally:
                call.cancel()
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)

    async def _pump(self, call: grpc.aio.UnaryStreamCall, feed: FeedCall | None, arrived: Mailbox[_Arrived]) -> None:
        """Moves what comes on the call's own stream to the queue, in order with the feed; None marks the end."""
        try:
            async for response in call:
                if feed is not None:
                    await feed.complete(response.feed_entries)
                arrived.put(response)
                if feed is not None:
                    feed.begin()
            arrived.put(None)
        except grpc.aio.AioRpcError as error:
            arrived.put(self._error(error))
        except PagewireError as error:  # the feed does not bring what the last event counts
            arrived.put(error)

    async def list_models(self) -> Sequence[pb.Model]:
        """The models that can be asked for. Raises PagewireError."""
        return (await self._ask("ListModels", pb.ListModelsRequest())).models

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Vectors of the inputs. Raises PagewireError."""
        if request.ByteSize() > MAX_MESSAGE_BYTES:
            raise InvalidRequest(f"The inputs are larger than {MAX_MESSAGE_BYTES >> 20} MiB; send several requests.")
        metadata = request_metadata(request.request_id)
        response: pb.EmbedResponse = await self._ask("Embed", request, timeout_s=self._timeout_s, metadata=metadata)
        return response

    async def reset_prefix_cache(self) -> None:
        """Every worker forgets what nobody uses now. Raises PagewireError."""
        await self._ask("ResetPrefixCache", worker_pb2.ResetPrefixCacheRequest())

    async def server_info(self) -> pb.ServerInfoResponse:
        """What the router and the workers were started with. Raises PagewireError."""
        response: pb.ServerInfoResponse = await self._ask("ServerInfo", pb.ServerInfoRequest())
        return response

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """A prompt as tokens. Raises PagewireError."""
        response: pb.TokenizeResponse = await self._ask("Tokenize", request)
        return response

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Tokens as text. Raises PagewireError."""
        response: pb.DetokenizeResponse = await self._ask("Detokenize", request)
        return response

    async def tokenizer_info(self, request: pb.TokenizerInfoRequest) -> pb.TokenizerInfoResponse:
        """How the tokenizer is set up. Raises PagewireError."""
        response: pb.TokenizerInfoResponse = await self._ask("TokenizerInfo", request)
        return response

    async def metrics(self) -> str:
        """Prometheus text of the router and its workers. Raises PagewireError."""
        return str((await self._ask("Metrics", pb.MetricsRequest())).text)

    async def _ask(self, method: str, request: Message, *, timeout_s: float = QUICK_S, metadata: Any = None) -> Any:
        """The answer to a call that is no stream. Raises PagewireError."""
        for again in (True, False):
            try:
                return await getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if not (again and error.details() == _CUT_OFF):
                    raise self._error(error) from error

    async def is_serving(self) -> bool:
        """Whether the router says that it can take requests."""
        try:
            answer = await self._link.health.Check(health_pb2.HealthCheckRequest(), timeout=QUICK_S)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def _error(self, error: grpc.aio.AioRpcError) -> PagewireError:
        """The router's own Error; without one, a sentence that does not show addresses to clients."""
        if any(key == ERROR_METADATA_KEY for key, _ in error.trailing_metadata() or ()):
            return from_rpc(error)
        log.warning("router call failed", status=error.code().name, details=error.details())
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"The request took longer than the server's limit of {self._timeout_s:g} s.")
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            stops = error.code() is grpc.StatusCode.CANCELLED or error.details() == _CUT_OFF
            kind = _RouterStops if stops else Unavailable
            return kind("The service cannot be reached right now; try again.", retry_after_s=1.0)
        return from_rpc(error)


@contextlib.contextmanager
def _no_feed(receive: object, broken: object) -> Iterator[FeedCall | None]:
    yield None


def client_of(request: Request) -> RouterClient:
    """The application's one client."""
    client: RouterClient = request.state.client
    return client


def time_allowed(request: Request) -> float:
    """Seconds that a proxy in front of us waits for the answer, if it says so: what cannot begin before is refused."""
    milliseconds = request.headers.get("x-envoy-expected-rq-timeout-ms", "")
    allowed_s = float(milliseconds) / 1e3 if milliseconds.isdecimal() else 0.0  # a float holds any number of digits
    return allowed_s or math.inf
