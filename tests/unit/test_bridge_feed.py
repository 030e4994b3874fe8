"""The bridge's client of the router with a feed open: the same events in the same order, and every failure seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass

import grpc
import pytest
import pytest_asyncio
from pagewire.v1.inference_pb2 import Delta, GenerateRequest, GenerateResponse
from pagewire_bridge.client import Event, RouterClient
from pagewire_bridge.generation import Generation
from pagewire_core.errors import Overloaded, PagewireError, Unavailable
from pagewire_core.rpc import RpcServer
from processes import free_port
from router_scene import until
from scripted_router import (
    HELLO,
    STOP,
    Events,
    ScriptedRouter,
    accepted,
    delta,
    refuses,
    running_router,
    says,
    stalls_after,
    summary,
)


@dataclass
class Link:
    router: ScriptedRouter
    server: RpcServer
    client: RouterClient

    async def events(self) -> list[Event]:
        return [event async for event in self.client.generate(GenerateRequest())]


@pytest_asyncio.fixture
async def link() -> AsyncIterator[Link]:
    router = ScriptedRouter(with_feed=True)
    async with running_router(router) as (server, address):
        client = RouterClient(address, 30.0)
        await until(lambda: client.feed_is_open)
        yield Link(router, server, client)
        await client.close()


async def test_deltas_come_bare_between_accepted_and_summary(link: Link) -> None:
    link.router.script = says(accepted(), delta("Hel"), delta("lo"), delta(finish=STOP), summary())
    first, *deltas, last = await link.events()
    assert isinstance(first, GenerateResponse)
    assert first.HasField("accepted")
    assert [d.text for d in deltas if isinstance(d, Delta)] == ["Hel", "lo", ""]
    assert isinstance(last, GenerateResponse)
    assert last.HasField("summary")
    assert last.feed_entries > 0
    assert len(link.router.requests[0].feed_id) == 16


async def test_an_error_comes_after_the_deltas_before_it(link: Link) -> None:
    error = GenerateResponse(error=Unavailable("lost").to_proto())
    link.router.script = says(accepted(), delta("Hel"), error)
    generation = Generation([link.client.generate(GenerateRequest())], 1)
    await generation.open()
    got: list[str] = []
    with pytest.raises(Unavailable, match="lost"):
        async for _, given in generation.deltas():
            got.append(given.text)
    assert got == ["Hel"]
    await generation.close()


async def test_a_refusal_is_a_refusal(link: Link) -> None:
    link.router.script = refuses(Overloaded("full", retry_after_s=2))
    with pytest.raises(Overloaded, match="full"):
        await link.events()


async def test_a_lost_router_ends_a_stream_that_waits_for_its_feed(link: Link) -> None:
    link.router.script = stalls_after(accepted(), delta("Hel"))
    events: list[Event] = []
    with pytest.raises(PagewireError) as caught:
        async for event in link.client.generate(GenerateRequest()):
            events.append(event)
            if len(events) == 2:
                await link.server.stop()
    assert isinstance(caught.value, Unavailable)
    assert "127.0.0.1" not in caught.value.message


async def test_a_break_of_the_feed_alone_ends_the_stream(link: Link) -> None:
    """The call's own stream is whole, but text on the feed is lost."""
    link.router.script = stalls_after(accepted(), delta("Hel"))
    with pytest.raises(Unavailable):
        async for event in link.client.generate(GenerateRequest()):
            if isinstance(event, Delta):
                assert link.router.feed_context
                with suppress(grpc.aio.AbortError):
                    await link.router.feed_context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
    await until(lambda: link.router.num_cancelled == 1)


async def test_leaving_a_stream_cancels_its_call_and_later_ones_are_whole(link: Link) -> None:
    link.router.script = stalls_after(accepted(), delta("Hel"))
    async with aclosing(link.client.generate(GenerateRequest())) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
    await until(lambda: link.router.num_cancelled == 1)
    link.router.reset()
    together = await asyncio.gather(*(link.events() for _ in range(2)), return_exceptions=True)
    assert not any(isinstance(events, BaseException) for events in together)


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_that_a_stopping_router_has_overlooked_is_asked_of_the_next_one(link: Link, begun: bool) -> None:
    """Its server ends what is left when its time is over. Not where the client has seen some of the answer."""
    asked: list[str] = []

    async def script(request: GenerateRequest) -> Events:
        asked.append(request.request_id)
        if begun:
            yield accepted()
        if len(asked) == 1:
            await link.router.context.abort(grpc.StatusCode.UNAVAILABLE, "Cancelling all calls")
        async for event in HELLO(request):
            yield event

    link.router.script = script
    if begun:
        with pytest.raises(Unavailable, match="try again"):
            await link.events()
    else:
        assert isinstance((await link.events())[-1], GenerateResponse)
    assert len(asked) == 2 - begun


async def test_routers_that_stop_one_after_the_other_lose_no_request() -> None:
    """A stopping server cancels calls that are on their way to it: gRPC alone lost a dozen of them each time."""
    ports, over = [free_port(), free_port()], asyncio.Event()
    routers = [ScriptedRouter(with_feed=True) for _ in ports]
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(running_router(r, port=p)) for r, p in zip(routers, ports, strict=True)
        ]
        client = RouterClient(f"ipv4:{','.join(address for _, address in servers)}", 30.0)

        async def ask_again_and_again() -> int:
            count = 0
            while not over.is_set():
                events = [event async for event in client.generate(GenerateRequest())]
                assert isinstance(events[-1], GenerateResponse) and events[-1].HasField("summary")
                await client.list_models()
                count += 1
            return count

        asking = [asyncio.create_task(ask_again_and_again()) for _ in range(20)]
        for i in (0, 1, 0, 1):
            await asyncio.sleep(0.2)
            routers[i].feeds.drain()
            await servers[i][0].stop(2)  # seldom a call is neither served nor cancelled before this is over
            routers[i] = ScriptedRouter(with_feed=True)
            servers[i] = await stack.enter_async_context(running_router(routers[i], port=ports[i]))
        over.set()
        assert min(await asyncio.gather(*asking)) > 0
        await client.close()


async def test_prompts_that_a_failure_ends_are_ended_though_the_client_leaves_meanwhile() -> None:
    """Their calls went on until somebody looked for garbage."""
    ending, go_on, ended = asyncio.Event(), asyncio.Event(), list[str]()

    async def fails() -> AsyncGenerator[Event]:
        raise Unavailable("lost")
        yield accepted()

    async def ends_slowly() -> AsyncGenerator[Event]:
        try:
            await asyncio.Event().wait()
            yield accepted()
        finally:
            ending.set()
            await go_on.wait()
            ended.append("slow")

    async def is_read() -> AsyncGenerator[Event]:
        try:
            while True:
                yield accepted()
        finally:
            ended.append("read")

    streams = [fails(), ends_slowly(), is_read()]
    opening = asyncio.create_task(Generation(streams, 1).open())
    await ending.wait()
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    go_on.set()
    await until(lambda: ended == ["slow", "read"])
