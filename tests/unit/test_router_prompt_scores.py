"""Log probabilities of a prompt's tokens through a real router: before any token, once, whole, whatever is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from fakes import FakeWorker
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest, Unavailable, from_rpc
from pagewire_core.tokenizer import Tokenizer
from router_scene import Answer, Scene, request, scene

LENGTH = common_pb2.FINISH_REASON_LENGTH


@pytest.fixture(autouse=True, params=["", "in order"], ids=["own stream", "feed"])
def feed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "feed", request.param)


def told(answer: Answer, scene: Scene, text: str = "hello", top: int = 2) -> None:
    """The prompt came whole, in order, and before anything else but Accepted."""
    kinds = [response.WhichOneof("event") for response in answer.responses]
    assert kinds[:2] == ["accepted", "prompt_tokens"] and "prompt_tokens" not in kinds[kinds.index("delta") :]
    tokens = [token for response in answer.responses for token in response.prompt_tokens.tokens]
    ids = scene.ids(text)
    assert [token.token_id for token in tokens] == ids
    assert b"".join(token.bytes for token in tokens) == text.encode()
    assert not tokens[0].HasField("logprob") and not tokens[0].top
    for token in tokens[1:]:
        assert (token.logprob, token.rank) == (-token.token_id, token.token_id + 1)
        assert [(t.token_id, t.logprob) for t in token.top] == [(token.token_id + 1 + i, -i) for i in range(top)]


@pytest.mark.parametrize("names", ["p1 d1", "d1"])
@pytest.mark.parametrize("text", ["hello", "h", "four"])
async def test_they_come_before_the_first_delta(byte_tokenizer: Tokenizer, names: str, text: str) -> None:
    async with scene(byte_tokenizer, names, reply="ok") as s:
        answer = await s.ask(text, prompt_logprobs=2, echo=True, n=2)
        told(answer, s, text)
        assert answer.text == {0: f"{text}ok", 1: f"{text}ok"} and answer.summary is not None
        asked = [r for worker in s.workers.values() for r in worker.requests if r.HasField("prompt_logprobs")]
        assert [type(r).__name__ for r in asked] == ["PrefillRequest" if "p1" in names else "DecodeRequest"]
        assert not any(r.HasField("holder") for r in asked)
        await s.settle()


async def test_a_long_prompt_comes_in_several_messages(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagewire_router.prompt_scores._TOKENS_PER_MESSAGE", 4)
    async with scene(byte_tokenizer, "p1 d1") as s:
        answer = await s.ask("0123456789", prompt_logprobs=0)
        told(answer, s, "0123456789", 0)
        assert [len(r.prompt_tokens.tokens) for r in answer.responses[1:4]] == [4, 4, 2]


async def test_what_the_decode_worker_says_waits_for_the_prompt(byte_tokenizer: Tokenizer) -> None:
    """All of the answer, and its stream's end, may be there before the prefill worker's last word of the prompt."""

    def hand_over(worker: FakeWorker) -> Any:
        for call in worker.requests:
            worker.peers[call.decode_address].kv_arrived(call.transfer_id).set()
        return asyncio.sleep(0.15)

    async with scene(byte_tokenizer, "p1 d1", reply="ok") as s:
        s.workers["p1"].script.hooks["prefill"] = hand_over
        answer = await s.ask(prompt_logprobs=2)
        told(answer, s)
        assert answer.text == {0: "ok"} and answer.summary is not None and answer.summary.attempts == 1
        await s.settle()


@pytest.mark.parametrize("stage", ["prefill", "scores"])
async def test_a_lost_prefill_worker_is_replaced_and_all_told_once(byte_tokenizer: Tokenizer, stage: str) -> None:
    def fail(worker: FakeWorker) -> None:
        for one in s.workers.values():
            one.script.hooks.clear()
        raise Unavailable("lost")

    async with scene(byte_tokenizer, "p1 p2 d1", reply="ok") as s:
        for name in ("p1", "p2"):
            s.workers[name].script.hooks[stage] = fail
        answer = await s.ask(prompt_logprobs=2)
        told(answer, s)
        assert answer.text == {0: "ok"} and answer.summary is not None and answer.summary.attempts == 2
        await s.settle()


async def test_a_prefill_worker_lost_before_it_told_is_no_small_loss(byte_tokenizer: Tokenizer) -> None:
    """For other requests an attempt may go on without it once the decode worker has the KV."""

    async def hand_over_and_fail(worker: FakeWorker) -> None:
        call = worker.requests[-1]
        worker.peers[call.decode_address].kv_arrived(call.transfer_id).set()
        await asyncio.sleep(0.1)
        worker.script.hooks.clear()
        raise Unavailable("lost")

    async with scene(byte_tokenizer, "p1 d1", reply="ok") as s:
        s.workers["p1"].script.hooks["prefill"] = hand_over_and_fail
        answer = await s.ask(prompt_logprobs=2)
        told(answer, s)
        assert answer.text == {0: "ok"} and answer.summary is not None and answer.summary.attempts == 2
        await s.settle()


async def test_who_goes_on_with_a_stream_is_not_asked_again(byte_tokenizer: Tokenizer) -> None:
    begun = asyncio.Event()

    async def fail(worker: FakeWorker) -> None:
        if worker.seen.count("decode") == 4:
            await begun.wait()  # a failure and the tokens on a feed may overtake each other
            for one in s.workers.values():
                one.script.hooks.clear()
            raise Unavailable("lost")

    async with scene(byte_tokenizer, "p1 d1 d2", reply="hello world") as s:
        for name in ("d1", "d2"):
            s.workers[name].script.hooks["decode"] = fail
        answer = Answer()
        async for response in s.stub.Generate(request(prompt_logprobs=2)):
            answer.add(response)
            if len(answer.text.get(0, "")) > 1:
                begun.set()
        told(answer, s)
        assert answer.text == {0: "hello world"} and answer.summary is not None and answer.summary.attempts == 2
        assert [r.HasField("prompt_logprobs") for r in s.workers["p1"].requests] == [True, False]


async def test_nothing_is_generated_where_only_the_prompt_is_wanted(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1", reply="ok") as s:
        answer = await s.ask(prompt_logprobs=2, prompt_only=True, echo=True, n=2, sampling={"stop": ["o"]})
        told(answer, s)
        assert answer.text == {0: "hello", 1: "hello"} and answer.ids == {0: [], 1: []}
        assert {i: d.finish_reason for i, d in answer.finish.items()} == {0: LENGTH, 1: LENGTH}
        assert answer.summary is not None and answer.summary.completion_tokens == 0
        await s.settle()


async def test_workers_that_do_not_know_how_are_not_asked(byte_tokenizer: Tokenizer) -> None:
    """Of the version before: they would answer, and leave out what was asked for."""
    asks: list[dict[str, Any]] = [
        {"prompt_logprobs": 0}, {"sampling": {"typical_p": 0.5}}, {"sampling": {"watermark": True}},
        {"sampling": {"bad_words": ["x"]}}, {"sampling": {"allowed_token_ids": [65]}},
        {"sampling": {"penalty_window": 9}}, {"sampling": {"logprob_token_ids": [65]}},
    ]  # fmt: skip
    async with scene(byte_tokenizer, "p1 d1 p2 d2", reply="ok") as s:
        for name in ("p1", "d1"):
            worker = s.router.services.workers.get(name)
            assert worker is not None
            worker.info.sampling_revision = 0
        for ask in asks * 2:
            assert (await s.ask(**ask)).text == {0: "ok"}
        assert not s.workers["p1"].requests and not s.workers["d1"].requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"sampling": {"typical_p": 0.0}}, "typical_p"),
        ({"sampling": {"typical_p": 1.5}}, "typical_p"),
    ],
)
async def test_what_is_out_of_range_is_refused(byte_tokenizer: Tokenizer, fields: dict[str, Any], param: str) -> None:
    async with scene(byte_tokenizer, "d1") as s:
        with pytest.raises(grpc.RpcError) as caught:
            [_ async for _ in s.stub.Generate(request(**fields))]
        error = from_rpc(caught.value)
        assert isinstance(error, InvalidRequest) and error.param == param


async def test_the_models_description_tells_how_much_is_taken(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1 d2") as s:
        [model] = (await s.stub.ListModels(inference_pb2.ListModelsRequest())).models
        # The queue, and a quarter more than the seats of both decode workers; their pools of 64 blocks.
        assert model.max_concurrent_requests == 16 + 20 and model.kv_tokens == 2 * 64 * 16


async def test_who_asks_of_a_prompt_alone_says_nothing_of_how_long_answers_are(byte_tokenizer: Tokenizer) -> None:
    """Many of them made long answers look like none to the placement."""
    lengths: list[float] = []
    async with scene(byte_tokenizer, "p1 d1") as s:
        s.router.services.placement.observe_output = lengths.append  # type: ignore[method-assign]
        await s.ask(prompt_logprobs=0, prompt_only=True)
        await s.ask()
    assert len(lengths) == 1 and lengths[0] > 1
