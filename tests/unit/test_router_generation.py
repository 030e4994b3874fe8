"""Requests through a real router to scripted workers: what goes well, and what is lost on the way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from fakes import FakeWorker
from pagewire.v1 import common_pb2, inference_pb2, prefill_pb2, worker_pb2
from pagewire_core import tracing
from pagewire_core.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    PagewireError,
    TransferLost,
    Unavailable,
    from_rpc,
)
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.attempt import Attempt
from pagewire_router.policies import POLICIES
from pagewire_router.request import validate
from pagewire_router.spans import AttemptSpans
from router_scene import EOS, Answer, Scene, request, scene, until

STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH


@pytest.fixture(autouse=True, params=["", "in order"], ids=["own stream", "feed"])
def feed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds whichever way the decode worker's tokens come."""
    monkeypatch.setattr(FakeWorker, "feed", request.param)


def kill(worker: FakeWorker) -> Any:
    """A hook under which the process dies: its connections break and nothing more comes from it."""

    async def die() -> None:
        asyncio.get_running_loop().create_task(worker.kill())
        await asyncio.sleep(60)

    return die()


def later(what: Callable[[FakeWorker], Any]) -> Callable[[FakeWorker], Any]:
    """The hook, when what the worker has made has left it."""

    async def wait(worker: FakeWorker) -> None:
        for _ in range(20):  # turns of the loop, in which all of this runs: one that is held up counts once
            await asyncio.sleep(0.005)
        result = what(worker)
        if result is not None:
            await result

    return wait


def never(worker: FakeWorker) -> Any:
    return asyncio.sleep(60)


def refuse(worker: FakeWorker) -> None:
    raise Overloaded("no credits", retry_after_s=1)


def lose_transfer(worker: FakeWorker) -> None:
    raise TransferLost("the network between the workers is cut")


def fail(worker: FakeWorker) -> None:
    raise Unavailable("lost the pair")


def total(name: str, scene: Scene, **labels: str) -> float:
    return scene.router.services.metrics.registry.get_sample_value(name, labels) or 0.0


async def test_a_prompt_is_computed_on_one_worker_and_answered_by_another(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", reply="héllo 🙂") as s:
        answer = await s.ask("question", request_id="r-1")
        assert answer.text == {0: "héllo 🙂"}
        assert answer.ids == {0: [*s.ids("héllo 🙂"), EOS]}
        assert (answer.finish[0].finish_reason, answer.finish[0].stop_token_id) == (STOP, EOS)
        summary = answer.summary
        assert summary is not None
        assert (summary.prefill_worker, summary.decode_worker, summary.attempts) == ("p1", "d1", 1)
        assert (summary.prompt_tokens, summary.transferred_tokens, summary.transferred_bytes) == (8, 8, 8000)
        assert (summary.cached_tokens, summary.computed_tokens, summary.lane) == (0, 8, "grpc")
        assert summary.completion_tokens == len(s.ids("héllo 🙂")) + 1
        assert 0 < summary.time_to_first_token_us <= summary.total_us
        await s.settle()
        assert s.workers["d1"].stopped == []
        prefill, decode = s.workers["p1"].requests[0], s.workers["d1"].requests[0]
        assert prefill.transfer_id == decode.transfer_id
        assert (prefill.request_id, prefill.decode_address) == ("r-1", s.workers["d1"].address)
        assert decode.request_id == "r-1"
        assert prefill.sampling.seed == decode.sampling.seed
        assert total("pagewire_requests_total", s, outcome="ok") == 1
        assert total("pagewire_route_total", s, decision="pair") == 1


async def test_the_first_token_reaches_the_client_before_the_kv_reaches_its_worker(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        go = asyncio.Event()
        s.workers["p1"].script.hooks["first_token"] = lambda worker: go.wait()
        call = s.stub.Generate(request())
        assert (await call.read()).HasField("accepted")
        assert (await call.read()).delta.text == "h"
        assert s.workers["d1"].seen == ["reserve"]
        go.set()
        rest = ""
        while (response := await call.read()) is not grpc.aio.EOF:
            rest += response.delta.text
        assert rest == "ello world"


async def test_without_a_prefill_worker_the_decode_worker_does_it_all(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "d1") as s:
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None
        assert (answer.summary.prefill_worker, answer.summary.transferred_tokens) == ("", 0)
        assert total("pagewire_route_total", s, decision="local") == 1


async def test_one_token_is_not_handed_over(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        answer = await s.ask(n=2, sampling={"max_tokens": 1})
        assert answer.text == {0: "h", 1: "h"}
        assert {d.finish_reason for d in answer.finish.values()} == {LENGTH}
        assert answer.summary is not None
        assert (answer.summary.decode_worker, answer.summary.prefill_worker) == ("p1", "")
        assert answer.summary.transferred_tokens == 0
        await s.settle()


async def test_one_token_needs_no_decode_worker(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1") as s:
        answer = await s.ask(sampling={"max_tokens": 1})
        assert answer.text == {0: "h"}


async def test_length_and_choices_and_echo(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        answer = await s.ask("Q:", n=3, echo=True, sampling={"max_tokens": 4})
        assert answer.text == {c: "Q:hell" for c in range(3)}
        assert {d.finish_reason for d in answer.finish.values()} == {LENGTH}
        assert answer.summary is not None
        assert answer.summary.completion_tokens == 12
        one = await s.ask(sampling={"max_tokens": 1})
        assert (one.text, one.finish[0].finish_reason) == ({0: "h"}, LENGTH)


async def test_a_stop_string_across_tokens_ends_the_choice_and_the_work(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", reply="hello world and more") as s:
        s.workers["d1"].script.step_s = 0.005
        answer = await s.ask(sampling={"stop": ["zz", "o w"]})
        assert answer.text == {0: "hell"}
        assert (answer.finish[0].finish_reason, answer.finish[0].stop_string) == (STOP, "o w")
        assert answer.summary is not None
        assert answer.summary.completion_tokens == len("hello w")
        await s.settle()
        assert s.workers["d1"].stopped == [()]


async def test_a_choice_that_its_first_token_ends_is_stopped_when_the_decode_worker_knows_of_it(
    byte_tokenizer: Tokenizer,
) -> None:
    """Told while the KV was on its way, it made all of the choice, and the answer did not end before that."""
    async with scene(byte_tokenizer, "p1 d1", reply="hello world") as s:
        for worker in s.workers.values():
            worker.script.first = s.ids("!h")
        s.workers["p1"].script.hooks["first_token"] = later(lambda worker: None)
        s.workers["d1"].script.hooks["decode_started"] = lambda worker: until(lambda: bool(worker.stopped), 5)
        answer = await s.ask(n=2, sampling={"stop": ["!"]})
        assert answer.text == {0: "", 1: "hello world"}
        assert s.workers["d1"].stopped == [(0,)]


async def test_an_end_of_sequence_as_first_token_is_an_empty_answer(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", reply="") as s:
        answer = await s.ask()
        assert (answer.text, answer.ids, answer.finish[0].finish_reason) == ({0: ""}, {0: [EOS]}, STOP)


async def test_cached_tokens_are_those_that_nobody_computed(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["p1"].script.cached_tokens = 3
        summary = (await s.ask("x" * 10)).summary
        assert summary is not None
        assert (summary.cached_tokens, summary.computed_tokens, summary.transferred_tokens) == (3, 7, 10)


@pytest.mark.parametrize("stage", ["prefill", "first_token"])
@pytest.mark.parametrize("names", ["p1 p2 d1", "p1 d1"])
async def test_a_killed_prefill_worker_costs_nothing_but_time(
    byte_tokenizer: Tokenizer, stage: str, names: str
) -> None:
    """Before and after the first token: the replay must not repeat what the client has."""
    async with scene(byte_tokenizer, names) as s:
        s.workers["p1"].script.hooks[stage] = kill
        answers = await asyncio.gather(*(s.ask() for _ in range(4)))
        assert [a.text for a in answers] == [{0: "hello world"}] * 4
        assert all(a.summary is not None and a.error is None for a in answers)
        s.workers["p1"].open_calls = 0
        await s.settle()
        if names == "p1 d1":
            assert {a.summary.attempts for a in answers if a.summary} == {2}
            assert total("pagewire_retries_total", s, leg="prefill") == 4


async def test_a_prefill_worker_lost_after_the_kv_arrived_is_not_missed(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        decoding, go = asyncio.Event(), asyncio.Event()
        s.workers["d1"].script.hooks["decode"] = at(3, lambda worker: go.wait())

        async def lose(worker: FakeWorker) -> None:
            s.workers["d1"].kv_arrived(s.workers["d1"].requests[0].transfer_id).set()
            await decoding.wait()
            go.set()
            raise Unavailable("gone")

        s.workers["p1"].script.hooks["first_token"] = lose
        answer = Answer()
        async for response in s.stub.Generate(request()):
            answer.add(response)
            if len(answer.ids.get(0, ())) == 2:  # a token of the decode worker's own is here
                decoding.set()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None
        assert answer.summary.attempts == 1


async def test_a_decode_worker_without_room_is_passed_over(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1 d2") as s:
        s.workers["d1"].script.hooks["reserve"] = refuse
        for _ in range(4):
            answer = await s.ask()
            assert answer.summary is not None
            assert (answer.summary.decode_worker, answer.summary.attempts) == ("d2", 1)
        await s.settle()
        assert total("pagewire_retries_total", s, leg="reserve") == 0


async def test_a_decode_worker_that_has_no_pages_when_the_kv_comes_is_passed_over(byte_tokenizer: Tokenizer) -> None:
    """The prefill worker, which tells of it, was passed over instead, and a decode worker computed the prompt."""

    def bind(worker: FakeWorker) -> None:
        if worker.peers[worker.requests[-1].decode_address].worker_id == "d1":
            refuse(worker)

    async with scene(byte_tokenizer, "p1 d1 d2", routing_policy="round_robin") as s:
        s.workers["p1"].script.hooks["prefill"] = bind
        summaries = [(await s.ask()).summary for _ in range(4)]
        assert {(told.prefill_worker, told.decode_worker) for told in summaries if told} == {("p1", "d2")}
        assert max(told.attempts for told in summaries if told) == 2
        assert total("pagewire_retries_total", s, leg="prefill") == 0


async def test_a_prefill_worker_that_refuses_is_passed_over(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = FakeWorker.Prefill

    async def unless_p1(self: FakeWorker, request: Any, context: Any) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        if self.worker_id == "p1":
            refuse(self)
        async for response in prefill(self, request, context):
            yield response

    monkeypatch.setattr(FakeWorker, "Prefill", unless_p1)
    async with scene(byte_tokenizer, "p1 p2 d1", routing_policy="round_robin") as s:
        summaries = [(await s.ask()).summary for _ in range(4)]
        assert {(told.prefill_worker, told.decode_worker) for told in summaries if told} == {("p2", "d1")}


async def test_a_worker_that_had_no_room_takes_over_from_one_that_is_lost_later(byte_tokenizer: Tokenizer) -> None:
    """Its refusal was held against it as long as the request lived, which was given up on the one that failed."""

    def lose(worker: FakeWorker) -> None:
        s.workers["d1"].script.hooks.clear()  # it has room again
        fail(worker)

    async with scene(byte_tokenizer, "p1 d1 d2", routing_policy="round_robin") as s:
        s.router.services.workers.get("d2").turn = 1  # d1 is next
        s.workers["d1"].script.hooks["reserve"] = refuse
        s.workers["d2"].script.hooks["decode"] = lose
        answer = await s.ask()
        assert (answer.text, answer.error) == ({0: "hello world"}, None)
        assert s.workers["d1"].seen.count("reserve") == 2
        assert answer.summary is not None
        assert (answer.summary.decode_worker, answer.summary.attempts) == ("d1", 2)


async def test_a_request_waits_until_a_decode_worker_has_room(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        refusals = iter([refuse, refuse, refuse])
        s.workers["d1"].script.hooks["reserve"] = lambda worker: next(refusals, lambda w: None)(worker)
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert s.workers["d1"].seen.count("reserve") == 4


async def test_more_choices_than_any_worker_runs_hold_up_nobody(byte_tokenizer: Tokenizer) -> None:
    """They waited until nothing ran at all, and everybody behind them, to be refused by a worker then."""
    async with scene(byte_tokenizer, "p1 d1") as s:
        going_on = asyncio.Event()
        s.workers["d1"].script.hooks["decode_started"] = lambda worker: going_on.wait()
        running = asyncio.create_task(s.ask())
        await until(lambda: "decode_started" in s.workers["d1"].seen)
        for sampling in ({}, {"max_tokens": 1}):
            with pytest.raises(grpc.RpcError, match=r"n must be at most 8 \(--max-num-seqs\), not 64") as caught:
                await asyncio.wait_for(s.ask(n=64, sampling=sampling), 5)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        going_on.set()
        assert (await running).text == {0: "hello world"}


async def test_a_retry_that_finds_no_room_waits_for_it(byte_tokenizer: Tokenizer) -> None:
    """The client had its first token, the pair broke, and the decode worker was full for a moment: that is no end."""
    async with scene(byte_tokenizer, "p1 p2 d1") as s:
        refusals = iter([lambda w: None, refuse, refuse, refuse, refuse])
        s.workers["d1"].script.hooks["reserve"] = lambda worker: next(refusals, lambda w: None)(worker)
        once = iter([fail])
        for name in ("p1", "p2"):
            s.workers[name].script.hooks["first_token"] = lambda worker: next(once, lambda w: None)(worker)
        answer = await s.ask()
        assert (answer.text, answer.error) == ({0: "hello world"}, None)
        assert s.workers["d1"].seen.count("reserve") == 6


async def test_waiting_for_room_ends_with_the_deadline(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", request_timeout=0.3) as s:
        s.workers["d1"].script.hooks["reserve"] = refuse
        with pytest.raises(grpc.RpcError) as caught:
            await s.ask()
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert 1 < s.workers["d1"].seen.count("reserve") < 10, "a worker without room was asked on and on"


async def test_where_no_worker_comes_a_request_is_told_so_before_its_time_is_up(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagewire_router.generation._NO_WORKER_WAIT_S", 0.05)
    async with scene(byte_tokenizer, "d1", request_timeout=3.0) as s:
        await s.workers["d1"].kill()
        await until(lambda: not s.router.services.workers.live)
        with pytest.raises(grpc.RpcError) as caught:
            await s.ask()
        error = from_rpc(caught.value)
        assert isinstance(error, Unavailable) and error.retry_after_s > 0
        assert "start a decode worker" in error.message


async def test_a_request_that_finds_no_worker_waits_for_one_to_come(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        worker = s.workers["d1"]
        worker.draining = True
        await until(lambda: not any(w.can_decode for w in s.router.services.workers.live))
        asking = asyncio.create_task(s.ask())
        await until(lambda: s.router.admission.num_running == 1)
        worker.draining = False
        assert (await asking).text == {0: "hello world"}


async def test_a_decode_worker_lost_before_it_gave_anything_is_replaced(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1 d2", routing_policy="round_robin") as s:
        s.workers["d1"].script.hooks["decode_started"] = kill
        answers = [await s.ask() for _ in range(6)]
        assert [a.text for a in answers] == [{0: "hello world"}] * 6
        assert s.workers["d1"].requests, "the lost worker was never tried"


def at(count: int, what: Callable[[FakeWorker], Any]) -> Callable[[FakeWorker], Any]:
    """A hook that does `what` the count-th time it is asked, by whichever worker."""
    asked = itertools.count(1)
    return lambda worker: what(worker) if next(asked) == count else None


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("resumes", [True, False], ids=["resumed", "replayed"])
async def test_a_decode_worker_lost_in_mid_stream_is_replaced_and_the_client_sees_nothing_of_it(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, n: int, resumes: bool
) -> None:
    """A worker of an older version does not know how to go on: what it gives again is compared, and not sent."""
    monkeypatch.setattr(FakeWorker, "resumes", resumes)
    async with scene(byte_tokenizer, "p1 d1 d2") as s:
        die = at(3, later(kill))
        for name in ("d1", "d2"):
            s.workers[name].script.hooks["decode"] = die
        answer = await s.ask(n=n)
        assert answer.ids == {i: [*s.ids("hello world"), EOS] for i in range(n)}
        assert answer.text == dict.fromkeys(range(n), "hello world")
        assert answer.summary is not None
        assert answer.summary.attempts == 2
        [second] = [request for name in ("d1", "d2") for request in s.workers[name].requests if request.prior]
        assert [list(output.token_ids) for output in second.prior] == [s.ids("hel")] * n
        assert total("pagewire_retries_total", s, leg="decode") == 1
        assert total("pagewire_resumed_requests_total", s) == resumes


async def test_a_choice_that_has_ended_is_not_made_anew_where_the_others_go_on(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "d1") as s:
        worker = s.workers["d1"]
        worker.script.first = s.ids("!h")
        worker.script.hooks["decode"] = at(3, later(fail))
        answer = await s.ask(n=2, sampling={"stop": ["!"]})
        assert answer.text == {0: "", 1: "hello world"}
        assert [output.ended for output in worker.requests[1].prior] == [True, False]


async def test_a_worker_that_leaves_a_choice_unfinished_is_replaced(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, asked = FakeWorker._steps, itertools.count(1)

    async def too_few(self: FakeWorker, request: Any) -> AsyncIterator[Any]:
        if next(asked) > 1:
            async for step in steps(self, request):
                yield step

    monkeypatch.setattr(FakeWorker, "_steps", too_few)
    async with scene(byte_tokenizer, "p1 d1") as s:
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None and answer.summary.attempts == 2


async def test_an_answer_that_its_only_worker_cannot_go_on_with_now_is_resumed_there(byte_tokenizer: Tokenizer) -> None:
    """As where its grammar is to be compiled again: nobody's failure."""
    async with scene(byte_tokenizer, "d1") as s:
        s.workers["d1"].script.hooks["decode"] = at(3, refuse)
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None and answer.summary.attempts == 2
        prior = [list(output.token_ids) for output in s.workers["d1"].requests[1].prior]
        assert prior in ([], [s.ids("he")], [s.ids("hel")]), "the error may be ahead of what comes over the feed"
        assert not list(s.router.services.placement.breakers)


async def test_a_request_is_given_up_only_when_attempts_in_a_row_gave_nothing(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        decoded = itertools.count(1)
        s.workers["d1"].script.hooks["decode"] = lambda worker: later(fail)(worker) if next(decoded) % 3 == 0 else None
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None
        assert answer.summary.attempts == 6

        s.workers["d1"].script.hooks["decode"] = lambda worker: fail(worker) if next(decoded) > 20 else None
        answer = await s.ask()
        assert "hello world".startswith(answer.text[0])
        assert answer.summary is None
        assert answer.error is not None
        assert answer.error.code == common_pb2.ERROR_CODE_UNAVAILABLE
        assert "decode worker was lost" in answer.error.message


async def test_a_worker_lost_after_the_last_token_is_not_missed(byte_tokenizer: Tokenizer) -> None:
    told = asyncio.Event()

    async def lost(worker: FakeWorker) -> None:
        await told.wait()  # a failure and the tokens on a feed may overtake each other
        fail(worker)

    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["d1"].script.hooks["finished"] = lost
        answer = Answer()
        async for response in s.stub.Generate(request()):
            answer.add(response)
            if answer.finish:
                told.set()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None
        assert answer.summary.attempts == 1


async def test_what_is_told_of_the_prompt_is_what_its_own_attempt_did(byte_tokenizer: Tokenizer) -> None:
    told = asyncio.Event()

    async def lost(worker: FakeWorker) -> None:
        await told.wait()  # a failure and the tokens on a feed may overtake each other
        fail(worker)

    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["d1"].script.hooks["decode"] = at(9, lost)
        first = at(1, lambda worker: setattr(worker.script, "cached_tokens", 4))
        s.workers["p1"].script.hooks["first_token"] = first
        answer = Answer()
        async for response in s.stub.Generate(request("question")):
            answer.add(response)
            if len(answer.text.get(0, "")) > 2:
                told.set()
        assert answer.summary is not None
        assert answer.summary.attempts == 2
        assert (answer.summary.cached_tokens, answer.summary.computed_tokens) == (0, 8)


async def test_the_last_attempt_is_a_decode_workers_alone(byte_tokenizer: Tokenizer) -> None:
    """The network between the pools may be cut: then every pair fails, and no decode worker by itself."""
    async with scene(byte_tokenizer, "p1 p2 p3 d1 d2", routing_policy="round_robin") as s:
        for name in ("p1", "p2", "p3"):
            s.workers[name].script.hooks["first_token"] = fail
        answer = await s.ask("hello", sampling={"max_tokens": 3})
        assert answer.summary is not None and answer.summary.attempts == 3
        assert answer.summary.prefill_worker == "" and answer.summary.decode_worker


async def test_the_last_attempt_has_no_worker_of_both_roles_beside_it(byte_tokenizer: Tokenizer) -> None:
    """Such workers went on to compute prompts for others, so that a cut network failed the last attempt, too."""
    async with scene(byte_tokenizer, "b1 b2 b3 d1") as s:
        for name, worker in s.workers.items():  # they would rather compute prompts, and d1 would rather not
            prefill, decode = (0.01, 1000.0) if name != "d1" else (50.0, 1.0)
            worker.step_cost = worker_pb2.StepCost(prefill_ms_per_token=prefill, decode_base_ms=decode)
            worker.script.hooks["prefill"] = lose_transfer
        await until(lambda: all(w.stats.step_cost.decode_base_ms for w in s.router.services.workers.live))
        answer = await s.ask("x" * 200)
        assert answer.summary is not None and answer.summary.attempts == 3
        assert (answer.summary.prefill_worker, answer.summary.decode_worker) == ("", "d1")


async def test_one_token_is_tried_alone_to_the_last_where_nobody_decodes(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 p2") as s:
        twice = iter([fail, fail])
        for worker in s.workers.values():
            worker.script.hooks["decode_started"] = lambda worker: next(twice, lambda w: None)(worker)
        answer = await s.ask(sampling={"max_tokens": 1})
        assert answer.summary is not None and answer.summary.attempts == 3


async def test_three_lost_attempts_are_enough(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["d1"].script.hooks |= {"reserve": fail, "decode_started": fail}
        answer = await s.ask()
        assert answer.summary is None and answer.error is not None
        assert answer.error.code == Unavailable.code and answer.error.retry_after_s > 0
        # Alone it gave a token before it was lost, so that the count began anew.
        assert s.workers["d1"].seen == ["reserve", "reserve", "decode_started", "reserve", "decode_started"]
        assert total("pagewire_requests_total", s, outcome="unavailable") == 1


@pytest.mark.parametrize(
    ("names", "role", "fields"),
    [
        ("p1", "prefill", {"sampling": {"max_tokens": 1}}),
        ("p1", "prefill", {"prompt_logprobs": 0, "prompt_only": True}),
        ("d1", "decode", {"sampling": {"max_tokens": 1}}),
        ("d1", "decode", {"prompt_logprobs": 0}),
    ],
)
async def test_an_error_names_the_worker_that_was_lost_by_its_role(
    byte_tokenizer: Tokenizer, names: str, role: str, fields: dict[str, Any]
) -> None:
    async with scene(byte_tokenizer, names) as s:
        s.workers[names].script.hooks["decode_started"] = fail
        try:
            answer = await s.ask(**fields)
        except grpc.RpcError as error:
            told = from_rpc(error).message
        else:
            assert answer.error is not None
            told = answer.error.message
        assert told.startswith(f"the {role} worker was lost: ")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (Internal("no numbers"), common_pb2.ERROR_CODE_INTERNAL, "the decode worker failed: no numbers"),
        (TransferLost("it stood still"), common_pb2.ERROR_CODE_UNAVAILABLE, "the KV transfer was lost: it stood still"),
    ],
)
async def test_an_error_says_what_has_failed(
    byte_tokenizer: Tokenizer, error: PagewireError, code: common_pb2.ErrorCode, told: str
) -> None:
    """A worker that computes what are no numbers is not lost, and it is of no use to ask again soon."""

    def hook(worker: object) -> None:
        raise error

    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["d1"].script.hooks["decode"] = hook
        answer = await s.ask()
        assert answer.error is not None
        assert (answer.error.code, answer.error.message) == (code, told)


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "on one worker"])
async def test_what_fails_wherever_it_is_tried_rests_no_worker(byte_tokenizer: Tokenizer, everywhere: bool) -> None:
    """A prompt of which a model makes no numbers, asked three times, kept a worker from all others' requests."""

    def hook(worker: object) -> None:
        raise Internal("no numbers")

    async with scene(byte_tokenizer, "d1 d2") as s:
        for worker in s.workers.values() if everywhere else [s.workers["d1"]]:
            worker.script.hooks["decode"] = hook
        s.router.services.placement.policy = POLICIES["round_robin"]
        for _ in range(6):
            assert ((await s.ask()).error is not None) is everywhere
        resting = [breaker.workers for breaker, _, _ in s.router.services.placement.breakers]
        assert resting == ([] if everywhere else [("d1",)])


@pytest.mark.parametrize("delay_s", [0.0, 60.0])
async def test_a_prefill_worker_is_booked_until_the_index_knows_of_the_prompt_that_it_handed_over(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, delay_s: float
) -> None:
    """Blocks that it gave back, and may have evicted, counted as hits to the end of a long answer. Without the delay
    nobody knew of them for a moment, and prompts that began alike went elsewhere.
    """
    monkeypatch.setattr("pagewire_router.attempt.INDEX_DELAY_S", delay_s)
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["d1"].script.hooks["decode"] = never
        answer = asyncio.create_task(s.ask("x" * 200))
        prefill, decode = (s.router.services.workers.get(name) for name in ("p1", "d1"))
        assert prefill and decode
        await until(lambda: "decode_started" in s.workers["d1"].seen and prefill.is_booked == (delay_s > 0))
        assert decode.is_booked and "prefill" in s.workers["p1"].seen
        answer.cancel()
        await s.settle()
        assert not decode.is_booked and not prefill.is_booked


async def test_a_replay_that_samples_otherwise_is_an_error_and_not_a_wrong_answer(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["p1"].script.hooks["first_token"] = fail
        s.workers["d1"].script.tokens = s.ids("other")
        answer = await s.ask()
        assert answer.summary is None
        assert answer.error is not None
        assert answer.error.code == Internal.code


@pytest.mark.parametrize(
    ("worker", "stage"),
    [("d1", "reserve"), ("p1", "prefill"), ("p1", "first_token"), ("d1", "decode_started"), ("d1", "decode")],
)
async def test_a_client_that_leaves_frees_both_workers(byte_tokenizer: Tokenizer, worker: str, stage: str) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers[worker].script.hooks[stage] = never
        call = s.stub.Generate(request())
        await until(lambda: stage in s.workers[worker].seen)
        call.cancel()
        await s.settle()
        assert s.workers["d1"].stopped == [()]
        assert "decode" in s.workers["d1"].cancelled or stage == "reserve"
        assert ("prefill" in s.workers["p1"].cancelled) == (worker == "p1")
        await until(lambda: total("pagewire_requests_total", s, outcome="cancelled") == 1)


async def test_a_client_that_leaves_while_a_lost_attempt_ends_leaves_nothing_behind(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was booked stayed: prompts were sent to blocks that never came, and the channel was never closed."""
    pump, ending, end = Attempt._pump, asyncio.Event(), asyncio.Event()

    async def slow_to_end(self: Attempt, leg: Any, call: Any) -> None:
        try:
            await pump(self, leg, call)
        except asyncio.CancelledError:
            ending.set()
            await end.wait()

    monkeypatch.setattr(Attempt, "_pump", slow_to_end)
    async with scene(byte_tokenizer, "p1 d1") as s:
        valid, now = validate(request(), s.router.model, 256), asyncio.get_running_loop().time()
        placed = s.router.services.placement.place(valid)
        assert placed is not None
        spans = AttemptSpans(tracing.current(), placed, 1, resumed=False)

        async def lose() -> None:
            async with Attempt(valid, placed, now + 20, 5.0, None, (), spans) as attempt:
                await attempt.reserve()
                async for _ in attempt.events():
                    pass

        s.workers["p1"].script.hooks["prefill"] = fail
        losing = asyncio.create_task(lose())
        await ending.wait()
        losing.cancel()
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await losing
        assert not any(worker.is_booked for worker in s.router.services.workers.live)
        assert s.workers["d1"].stopped == [()]


async def test_a_client_that_leaves_the_queue_is_forgotten(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["d1"].script.hooks["decode_started"] = never
        calls = [s.stub.Generate(request(n=8)) for _ in range(3)]
        await until(lambda: s.router.admission.num_queued == 2)
        for call in reversed(calls):
            call.cancel()
        await s.settle()
        assert s.router.admission.num_queued == 0
        await until(lambda: total("pagewire_requests_total", s, outcome="cancelled") == 3)


async def test_a_full_router_answers_overloaded_with_a_time(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", max_queued_requests=1) as s:
        s.workers["d1"].script.hooks["decode_started"] = never
        calls = [s.stub.Generate(request(n=8)) for _ in range(2)]
        await until(lambda: s.router.admission.num_queued == 1)
        with pytest.raises(grpc.RpcError) as caught:
            await s.ask()
        error = from_rpc(caught.value)
        assert isinstance(error, Overloaded)
        assert error.retry_after_s >= 1
        for call in calls:
            call.cancel()
        await s.settle()


async def test_a_request_that_takes_too_long_ends_with_an_error_event(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", request_timeout=1.0) as s:
        s.workers["d1"].script.hooks["decode_started"] = never
        answer = await s.ask()
        assert answer.error is not None
        assert answer.error.code == common_pb2.ERROR_CODE_DEADLINE
        await s.settle()
        assert s.workers["d1"].stopped == [()]


async def test_a_worker_that_does_not_answer_a_reservation_prolongs_no_request(byte_tokenizer: Tokenizer) -> None:
    """It was waited for 5 seconds, and then asked once more, whatever the request was allowed to take."""
    async with scene(byte_tokenizer, "p1 d1", request_timeout=0.3) as s:
        s.workers["d1"].script.hooks["reserve"] = never
        begun = asyncio.get_running_loop().time()
        with pytest.raises(grpc.RpcError) as caught:
            await s.ask()
        assert isinstance(from_rpc(caught.value), DeadlineExceeded)
        assert asyncio.get_running_loop().time() - begun < 4
        assert not list(s.router.services.placement.breakers), "that is no fault of the worker"
        await s.settle()


async def test_a_transfer_that_stands_still_is_tried_elsewhere(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", transfer_timeout=0.1) as s:
        s.workers["p1"].script.hooks["first_token"] = never
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None
        assert answer.summary.attempts == 2
        await s.settle()


async def test_an_answer_does_not_wait_for_a_prefill_worker_that_says_nothing_more_of_it(
    byte_tokenizer: Tokenizer,
) -> None:
    async def stand_still(worker: FakeWorker) -> None:
        s.workers["d1"].kv_arrived(s.workers["d1"].requests[0].transfer_id).set()
        await asyncio.sleep(60)

    async with scene(byte_tokenizer, "p1 d1") as s:
        s.workers["p1"].script.hooks["first_token"] = stand_still
        async with asyncio.timeout(5):
            answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None and answer.summary.attempts == 1
        await s.settle()
        assert "prefill" in s.workers["p1"].cancelled and s.workers["d1"].stopped == []


@pytest.mark.parametrize("stage", ["reserve", "prefill", "decode_started"])
async def test_what_a_worker_finds_wrong_with_a_request_is_told_and_not_tried_elsewhere(
    byte_tokenizer: Tokenizer, stage: str
) -> None:
    def find(worker: FakeWorker) -> None:
        raise InvalidRequest("the grammar cannot be followed", "structured_outputs")

    async with scene(byte_tokenizer, "p1 p2 d1 d2") as s:
        for worker in s.workers.values():
            worker.script.hooks[stage] = find
        try:
            error = (await s.ask()).error
        except grpc.RpcError as failure:
            error = from_rpc(failure).to_proto()
        assert error is not None and error.param == "structured_outputs"
        assert (error.code, error.message) == (InvalidRequest.code, "the grammar cannot be followed")
        assert sum(worker.seen.count(stage) for worker in s.workers.values()) == 1
        assert not list(s.router.services.placement.breakers)


async def test_an_answer_may_take_longer_than_its_transfer_was_allowed_to(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", transfer_timeout=0.05) as s:
        s.workers["d1"].script.step_s = 0.02
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        assert answer.summary is not None
        assert (answer.summary.attempts, answer.summary.total_us > 100_000) == (1, True)


async def test_logprobs_come_with_their_tokens(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        answer = await s.ask(sampling={"logprobs": 2, "max_tokens": 2})
        tokens = [t for r in answer.responses if r.HasField("delta") for t in r.delta.tokens]
        assert [t.bytes for t in tokens] == [b"h", b"e"]
        assert all(t.HasField("logprob") for t in tokens)
        plain = await s.ask(sampling={"max_tokens": 2})
        assert not any(t.HasField("logprob") for r in plain.responses for t in r.delta.tokens)


async def test_a_bad_request_never_reaches_a_worker(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        with pytest.raises(grpc.RpcError) as caught:
            await s.ask(model="other")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as caught:
            await s.ask("x" * 300)
        assert "maximum context length is 256" in from_rpc(caught.value).message
        assert not s.workers["d1"].seen
        models = await s.stub.ListModels(inference_pb2.ListModelsRequest())
        assert [(m.name, m.ready, m.max_model_len) for m in models.models] == [("demo", True, 256)]
