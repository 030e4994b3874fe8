"""A router that says what a test tells it to, over real gRPC, and the real bridge in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import orjson
from openai import AsyncOpenAI
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from pagewire.v1.inference_pb2 import Accepted, Delta, GenerateRequest, GenerateResponse, Summary, TokenText
from pagewire_bridge.answer_parser import NO_FORMAT, AnswerFormat
from pagewire_bridge.app import create_app
from pagewire_bridge.client import RouterClient
from pagewire_bridge.main import build_server, listen
from pagewire_core.feed import Feed, Feeds
from pagewire_core.rpc import RpcServer
from pagewire_core.tls import TlsFiles

STOP = common_pb2.FINISH_REASON_STOP
LENGTH = common_pb2.FINISH_REASON_LENGTH

Events = AsyncGenerator[GenerateResponse, None]
Script = Callable[[GenerateRequest], Events]


def accepted(model: str = "demo") -> GenerateResponse:
    return GenerateResponse(accepted=Accepted(model=model, prompt_tokens=7))


def delta(text: str = "", choice: int = 0, finish: int = 0, **more: object) -> GenerateResponse:
    return GenerateResponse(delta=Delta(choice=choice, text=text, finish_reason=finish, **more))  # type: ignore[arg-type]


def summary(completion_tokens: int = 3) -> GenerateResponse:
    return GenerateResponse(
        summary=Summary(
            prompt_tokens=7,
            completion_tokens=completion_tokens,
            cached_tokens=4,
            computed_tokens=3,
            transferred_tokens=6,
            transferred_bytes=1234,
            lane="gloo",
            prefill_worker="p0",
            decode_worker="d0",
        )
    )


def token(data: bytes, logprob: float, *top: TokenText) -> TokenText:
    return TokenText(token_id=len(data), bytes=data, logprob=logprob, top=top)


def says(*events: GenerateResponse) -> Script:
    """A script that gives these events whatever is asked."""

    async def script(_request: GenerateRequest) -> Events:
        for event in events:
            yield event

    return script


def refuses(error: Exception) -> Script:
    async def script(_request: GenerateRequest) -> Events:
        raise error
        yield

    return script


def stalls_after(*events: GenerateResponse) -> Script:
    """These events, and then nothing until the call is cancelled."""

    async def script(_request: GenerateRequest) -> Events:
        for event in events:
            yield event
        await asyncio.sleep(60)

    return script


HELLO = says(accepted(), delta("Hel"), delta("lo"), delta(finish=STOP), summary())


class ScriptedRouter(inference_pb2_grpc.InferenceServiceServicer):
    """requests: what was asked; cancelled: calls that were ended from outside."""

    def __init__(self, with_feed: bool = False) -> None:
        self.with_feed = with_feed
        self.feeds = Feeds(inference_pb2.DeltaFeedResponse)
        self.feed_context: grpc.aio.ServicerContext | None = None  # of the last feed
        self.reset()
        self.metrics_text = "# HELP pagewire_x_total x\n# TYPE pagewire_x_total counter\npagewire_x_total 2.0\n"

    def reset(self) -> None:
        self.script: Script = HELLO
        self.requests: list[GenerateRequest] = []
        self.num_started = 0
        self.num_ended = 0
        self.num_cancelled = 0

    async def Generate(self, request: GenerateRequest, context: grpc.aio.ServicerContext) -> Events:
        self.requests.append(request)
        self.context = context  # of the last call
        self.time_remaining: float | None = context.time_remaining()
        self.num_started += 1
        feed = self.feeds.get(request.feed_id)
        try:
            with feed.used() if feed else nullcontext():
                async with aclosing(self._told(request, feed)) as events:
                    async for event in events:
                        yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_ended += 1

    async def _told(self, request: GenerateRequest, feed: Feed[inference_pb2.DeltaFeedResponse] | None) -> Events:
        num_entries = 0
        async for event in self.script(request):
            if feed and event.HasField("delta"):
                entry, new = feed.entry(request.feed_call)
                entry.deltas.append(event.delta)
                num_entries += new
            else:
                counted = GenerateResponse(feed_entries=num_entries)
                counted.MergeFrom(event)
                yield counted

    async def DeltaFeed(
        self, request: inference_pb2.DeltaFeedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.DeltaFeedResponse]:
        if not self.with_feed:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no feeds here")
        self.feed_context = context
        async with aclosing(self.feeds.serve(request.feed_id)) as batches:
            async for batch in batches:
                yield batch

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        names = ("demo", "org/name with space")
        models = [inference_pb2.Model(name=n, root="/m", max_model_len=512, created=17) for n in names]
        return inference_pb2.ListModelsResponse(models=models)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(tokens=[inference_pb2.Token(id=5, bytes=b"hi", end=2)], text="hi")

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        return inference_pb2.DetokenizeResponse(text="hi")

    async def Metrics(
        self, request: inference_pb2.MetricsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.MetricsResponse:
        return inference_pb2.MetricsResponse(text=self.metrics_text)


@dataclass
class Bridge:
    """A running bridge: what a test talks to it with."""

    url: str
    router: ScriptedRouter
    router_server: RpcServer
    http: httpx.AsyncClient
    openai: AsyncOpenAI

    async def chat(self, **fields: object) -> httpx.Response:
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.http.post("/v1/chat/completions", content=orjson.dumps(body))

    async def complete(self, **fields: object) -> httpx.Response:
        return await self.http.post(
            "/v1/completions", content=orjson.dumps({"model": "demo", "prompt": "hi", **fields})
        )


@asynccontextmanager
async def running_router(
    router: ScriptedRouter, tls: TlsFiles | None = None, port: int = 0
) -> AsyncIterator[tuple[RpcServer, str]]:
    server = RpcServer(tls)
    server.add(
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        router,
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    )
    bound = await server.start("127.0.0.1", port)
    await server.set_serving(True)
    yield server, f"127.0.0.1:{bound}"
    await server.stop()


@asynccontextmanager
async def running_bridge(
    request_timeout_s: float = 30.0, send_timeout_s: float = 30.0, answers: AnswerFormat = NO_FORMAT, **options: Any
) -> AsyncIterator[Bridge]:
    router = ScriptedRouter()
    async with running_router(router) as (router_server, address):
        listener = listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = build_server(
            create_app(lambda: RouterClient(address, request_timeout_s), answers=answers, **options),
            send_timeout_s=send_timeout_s,
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with (
            httpx.AsyncClient(base_url=url, timeout=10) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=10) as client,
        ):
            yield Bridge(url, router, router_server, http, client)
        server.should_exit = True
        await serving


def events_of(text: str) -> list[dict[str, object] | str]:
    """The data of every event of an SSE body; [DONE] as that string."""
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [d if d == "[DONE]" else orjson.loads(d) for d in data]


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
