"""Embeddings through a real router to scripted workers: what is lost on the way."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from fakes import FakeWorker
from pagewire.v1 import inference_pb2, prefill_pb2
from pagewire_core.errors import Overloaded, PagewireError, Unavailable, from_rpc
from pagewire_core.tokenizer import Tokenizer
from router_scene import scene

Served = Callable[[FakeWorker], Awaitable[None]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Served], None]:
    """Has every worker do so for an input, and then tell its token ids as its vector."""

    def use(served: Served) -> None:
        async def embed(
            self: FakeWorker, request: prefill_pb2.EmbedPromptRequest, context: Any
        ) -> prefill_pb2.EmbedPromptResponse:
            async with self._call("embed"):
                self.seen.append("embed")
                await served(self)
                return prefill_pb2.EmbedPromptResponse(vector=request.prompt_ids)

        monkeypatch.setattr(FakeWorker, "Embed", embed)

    return use


def asked(*texts: str) -> inference_pb2.EmbedRequest:
    return inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput(text=text) for text in texts])


@pytest.mark.parametrize("error", [Overloaded, Unavailable])
@pytest.mark.parametrize("names", ["p1 d1", "p1 p2 d1", "p1 p2 p3 p4 d1"])
async def test_an_input_is_given_up_after_three_attempts_however_few_workers_there_are(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None], names: str, error: type[PagewireError]
) -> None:
    """Workers were counted instead: where there are two, the third never came, and they were asked without a pause."""

    async def fail(worker: FakeWorker) -> None:
        raise error("a step of the engine failed")

    serve(fail)
    async with scene(byte_tokenizer, names) as s:
        with pytest.raises(grpc.RpcError) as caught:
            await s.stub.Embed(asked("hello"), timeout=5)
        assert isinstance(from_rpc(caught.value), error)
        calls = [len(worker.seen) for worker in s.workers.values() if worker.seen]
        assert (sum(calls), len(calls)) == (3, min(names.count("p"), 3))


async def test_the_first_retry_is_at_once_and_the_second_after_a_pause(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None]
) -> None:
    called: list[float] = []

    async def fail_twice(worker: FakeWorker) -> None:
        called.append(time.monotonic())
        if len(called) < 3:
            raise Unavailable("a step of the engine failed")

    serve(fail_twice)
    async with scene(byte_tokenizer, "p1 d1") as s:
        answer = await s.stub.Embed(asked("hello"))
        assert list(answer.embeddings[0].vector) == s.tokenizer.encode("hello", True)
    first, second, third = called
    assert second - first < 0.4 < third - second
