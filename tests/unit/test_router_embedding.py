"""Embeddings through a real router to scripted workers: their way through the queue, and what is lost on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from fakes import FakeWorker
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import inference_pb2, prefill_pb2
from pagewire_core.errors import Cancelled, Internal, Overloaded, PagewireError, Unavailable, from_rpc
from pagewire_core.tokenizer import Tokenizer
from pagewire_router import embedding, workers
from pagewire_router.fair_queue import QUANTUM
from pagewire_router.room import Room
from router_scene import scene, until

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


async def at_once(worker: FakeWorker) -> None:
    pass


async def never(worker: FakeWorker) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("length", [1, 200], ids=["short", "long"])
async def test_a_request_of_many_inputs_does_not_fill_the_queue_that_it_waits_in(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None], length: int
) -> None:
    """Each of them was an entry of its own, so that an idle router refused what it allows."""
    serve(at_once)
    texts = [chr(ord("a") + i % 26) * length for i in range(400)]
    async with scene(byte_tokenizer, "p1 p2 d1", max_queued_requests=1, max_queued_tokens=1) as s:
        answer = await s.stub.Embed(asked(*texts))
        expected = [s.tokenizer.encode(text, True) for text in texts]
        assert [list(one.vector) for one in answer.embeddings] == expected
        assert (answer.model, answer.prompt_tokens) == ("demo", sum(map(len, expected)))
        await s.settle()


async def test_one_part_of_a_request_waits_at_a_time_and_its_clients_leaving_ends_all(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None]
) -> None:
    serve(never)
    async with scene(byte_tokenizer, "p1 d1") as s:
        calls = [s.stub.Embed(asked(*["x" * 200] * 40)) for _ in range(2)]
        await until(lambda: s.router.admission.num_queued == 2)
        await until(lambda: len(s.workers["p1"].seen) == s.router.admission.num_running)
        for call in calls:
            call.cancel()
        await s.settle()
        assert s.router.admission.num_queued == 0


async def test_free_blocks_of_decode_workers_are_not_waited_for(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None]
) -> None:
    serve(at_once)
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["d1"].script.hooks["decode"] = never
        running = [asyncio.create_task(s.ask())]
        await until(lambda: "decode_started" in s.workers["d1"].seen)
        s.router.admission._room = lambda: Room(kv_tokens=0)
        running.append(asyncio.create_task(s.ask()))
        await until(lambda: s.router.admission.num_queued == 1)
        assert (await s.stub.Embed(asked("x" * 40, "y"))).embeddings
        for task in running:
            task.cancel()
        await s.settle()


async def test_waiting_in_the_queue_ends_with_the_deadline(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None]
) -> None:
    serve(never)
    async with scene(byte_tokenizer, "p1 d1", request_timeout=0.3) as s:
        with pytest.raises(grpc.RpcError) as caught:
            await s.stub.Embed(asked(*["x" * 200] * 40))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await s.settle()


async def test_the_first_input_that_fails_ends_the_others(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None]
) -> None:
    async def fail_third(worker: FakeWorker) -> None:
        if len(worker.seen) == 3:
            raise Internal("our fault")
        await never(worker)

    serve(fail_third)
    async with scene(byte_tokenizer, "p1 d1") as s:
        with pytest.raises(grpc.RpcError) as caught:
            await s.stub.Embed(asked(*["x" * 20] * 40), timeout=10)
        assert isinstance(from_rpc(caught.value), Internal)
        await s.settle()


@given(st.lists(st.integers(1, 2 * QUANTUM).map(lambda length: [0] * length), min_size=1))
def test_a_part_is_about_a_turn_of_the_queue(inputs: list[list[int]]) -> None:
    parts = list(embedding.parts_of(inputs))
    assert [ids for part in parts for ids in part] == inputs
    tokens = [sum(map(len, part)) for part in parts]
    assert all(len(part) == 1 or many <= QUANTUM for part, many in zip(parts, tokens, strict=True))
    assert all(many + len(following[0]) > QUANTUM for many, following in zip(tokens, parts[1:], strict=False))


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


async def test_an_input_that_a_stopping_worker_cancels_is_asked_of_another(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None]
) -> None:
    """gRPC says so for the server of what it had not begun; the client was told that it had left."""
    first = True

    async def cancel_first(worker: FakeWorker) -> None:
        nonlocal first
        if first:
            first = False
            raise Cancelled("CANCELLED")

    serve(cancel_first)
    async with scene(byte_tokenizer, "p1 p2 d1") as s:
        answer = await s.stub.Embed(asked("hello"))
        assert list(answer.embeddings[0].vector) == s.tokenizer.encode("hello", True)
        assert [len(s.workers[name].seen) for name in ("p1", "p2")] == [1, 1]


async def test_an_input_outlives_a_worker_that_falls_silent(
    byte_tokenizer: Tokenizer, serve: Callable[[Served], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection answers, so that the input waited until the request's time was over."""
    monkeypatch.setattr(workers, "_DEAD_S", 0.5)
    silent: list[FakeWorker] = []

    async def fall_silent(worker: FakeWorker) -> None:
        if not silent:
            silent.append(worker)
            worker.silent = True
            await never(worker)

    serve(fall_silent)
    async with scene(byte_tokenizer, "p1 p2 d1") as s:
        answer = await s.stub.Embed(asked("hello"), timeout=10)
        assert list(answer.embeddings[0].vector) == s.tokenizer.encode("hello", True)
        await until(lambda: silent[0].cancelled == ["embed"])
