"""The router calls behind one HTTP request (one per prompt), read as one stream of deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import Internal, from_proto

from pagewire_bridge.client import Event

Events = AsyncGenerator[Event]

_FINISHED = (common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH)


async def merge(streams: Sequence[Events]) -> AsyncGenerator[tuple[int, Event]]:
    """(number of the stream, event) as they come; the first failure, or closing, ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for event in only:
                yield 0, event
        return
    reads = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while reads:
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            for read in done:
                i = reads.pop(read)
                try:
                    event = read.result()
                except StopAsyncIteration:
                    continue
                reads[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, event
    finally:
        # A client may leave while a failure ends the others: who waits for that is then cancelled, and it goes on.
        await asyncio.shield(_end(reads, streams))


async def _end(reads: Collection[asyncio.Future[Event]], streams: Sequence[Events]) -> None:
    for read in reads:
        read.cancel()
    await asyncio.gather(*reads, return_exceptions=True)
    for stream in streams:
        await stream.aclose()


class Generation:
    """Life: `open` (until every prompt is accepted), `deltas` to the end, then `summaries`; `close` at any time.

    accepted, summaries and prompt_tokens (where they were asked for, there before the first delta) are in the order of
    the prompts. The index of a choice is prompt * n + choice. charge is told once, at the end, how many tokens of
    prompts and answers there were.
    """

    def __init__(
        self, streams: Sequence[Events], n: int, charge: Callable[[int], None] = lambda num_tokens: None
    ) -> None:
        self.accepted = [inference_pb2.Accepted()] * len(streams)
        self.summaries = [inference_pb2.Summary()] * len(streams)
        self.prompt_tokens: list[list[inference_pb2.TokenText]] = [[] for _ in streams]
        self._n = n
        self._events = merge(streams)
        self._early: list[tuple[int, inference_pb2.Delta]] = []  # came while another prompt was not yet accepted
        self._ended = 0
        self._unfinished = set(range(len(streams) * n))
        self._charge = charge
        self.num_output_tokens = 0  # so far

    async def open(self) -> None:
        """Returns when all prompts are accepted. Raises PagewireError when one is refused."""
        missing = set(range(len(self.accepted)))
        async for prompt, event in self._events:
            if isinstance(event, inference_pb2.GenerateResponse) and event.HasField("accepted"):
                self.accepted[prompt] = event.accepted
                missing.discard(prompt)
                if not missing:
                    return
            elif delta := self._take(prompt, event):
                self._early.append(delta)
        raise Internal("The router ended the request without accepting it.")

    async def deltas(self) -> AsyncGenerator[tuple[int, inference_pb2.Delta]]:
        """(index, delta) of every choice to its end. Raises PagewireError when a call fails or ends too early."""
        for early in self._early:
            yield early
        async for prompt, event in self._events:
            if delta := self._take(prompt, event):
                yield delta
        if self._unfinished or self._ended < len(self.summaries):
            raise Internal("The router ended the request before every choice was finished.")

    async def close(self) -> None:
        """Cancels what still runs."""
        await self._events.aclose()
        self._charge(self.num_prompt_tokens + self.num_output_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(accepted.prompt_tokens for accepted in self.accepted)

    def _take(self, prompt: int, event: Event) -> tuple[int, inference_pb2.Delta] | None:
        if isinstance(event, inference_pb2.Delta):
            return self._numbered(prompt, event)
        kind = event.WhichOneof("event")
        if kind == "error":
            raise from_proto(event.error)
        if kind == "prompt_tokens":
            self.prompt_tokens[prompt].extend(event.prompt_tokens.tokens)
        if kind == "summary":
            self.summaries[prompt] = event.summary
            self._ended += 1
        return self._numbered(prompt, event.delta) if kind == "delta" else None

    def _numbered(self, prompt: int, delta: inference_pb2.Delta) -> tuple[int, inference_pb2.Delta]:
        index = prompt * self._n + delta.choice
        self.num_output_tokens += len(delta.tokens)
        if delta.finish_reason in _FINISHED:
            self._unfinished.discard(index)
        return index, delta
