"""What `Explain` and `pagewire explain` say is what Generate then does."""

from __future__ import annotations

import argparse
import asyncio
import json

import grpc
import pytest
from fakes import FakeWorker
from pagewire.v1 import inference_pb2
from pagewire_cli.explain import add_subcommand, explain
from pagewire_cli.main import main
from pagewire_core.command_line import Parser
from pagewire_core.errors import StartupError, TransferLost, Unavailable
from pagewire_core.tokenizer import Tokenizer
from router_scene import PROMPT, give_prefix, request, scene, until


async def test_every_term_is_told_and_nothing_is_run(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 p2 d1") as s:
        answer = await s.stub.Explain(request(PROMPT, sampling={"max_tokens": 5}))
        assert (answer.policy, answer.unit, answer.prompt_tokens, answer.output_tokens) == ("pagewire", "ms", 200, 5)
        chosen = {(c.prefill_worker, c.decode_worker): c.may_be_chosen for c in answer.candidates}
        assert chosen == {("p1", "d1"): True, ("p2", "d1"): True, ("", "d1"): False}
        for candidate in answer.candidates:
            terms = {term.name: term.value for term in candidate.terms}
            always = {"queue", "prefill", "delay", "eviction", "decode", "harm", "eviction_d", "held"}
            assert terms.keys() - always == ({"transfer"} if candidate.prefill_worker else {"stall", "role"})
            assert candidate.cost == pytest.approx(sum(terms.values()))
            assert candidate.predicted_ttft_ms > 0
        assert {w.worker_id: w.hit_tokens for w in answer.workers} == {"p1": 0, "p2": 0, "d1": 0}
        assert not any(w.seen for w in s.workers.values())
        assert not any(w.is_booked for w in s.router.services.workers.live)


async def test_what_is_explained_is_what_is_done(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 p2 d1 d2") as s:
        await give_prefix(s, "d1")
        answer = await s.stub.Explain(request(PROMPT))
        best = [(c.prefill_worker, c.decode_worker) for c in answer.candidates if c.may_be_chosen]
        assert best == [("", "d1")], "it has nearly all of the prompt"
        assert {w.worker_id: w.hit_tokens for w in answer.workers} == {"p1": 0, "p2": 0, "d1": 192, "d2": 0}
        done = await s.ask(PROMPT)
        assert done.summary is not None
        assert (done.summary.prefill_worker, done.summary.decode_worker) == best[0]
        await s.settle()


async def test_a_session_is_drawn_to_where_it_was(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1 d2 d3 d4") as s:
        first = await s.ask(session_id="chat")
        assert first.summary is not None
        there = first.summary.decode_worker
        for session, discounted in (("chat", {there}), ("another", set()), ("", set())):
            answer = await s.stub.Explain(request(session_id=session))
            assert {
                c.decode_worker for c in answer.candidates if any(t.name == "session" for t in c.terms)
            } == discounted
        for _ in range(3):
            answer = await s.ask(session_id="chat")
            assert answer.summary is not None and answer.summary.decode_worker == there
        await s.settle()


async def test_a_prompt_that_is_on_its_way_counts_as_a_hit(byte_tokenizer: Tokenizer) -> None:
    """Ten requests of one prefix at once were spread over all prefill workers, and each computed it."""
    async with scene(byte_tokenizer, "p1 p2 d1") as s:
        go = asyncio.Event()
        for name in ("p1", "p2"):
            s.workers[name].script.hooks["prefill"] = lambda worker: go.wait()
        first = asyncio.create_task(s.ask(PROMPT))
        await until(lambda: any(s.workers[p].seen for p in ("p1", "p2")))
        [busy] = [p for p in ("p1", "p2") if s.workers[p].seen]
        answer = await s.stub.Explain(request(PROMPT + "and more"))
        hits = {w.worker_id: w.hit_tokens for w in answer.workers}
        assert hits == {"p1": 0, "p2": 0, busy: 192, "d1": 192}
        go.set()
        await first
        await s.settle()
        answer = await s.stub.Explain(request(PROMPT))
        assert {w.hit_tokens for w in answer.workers} == {0}, "these workers published nothing"


async def test_what_failed_again_and_again_is_left_alone_and_shown(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(byte_tokenizer, "p1 p2 d1") as s:
        monkeypatch.setattr(s.router.services.placement.breakers, "_clock", lambda: 0.0)  # however slow this is

        def fail(worker: FakeWorker) -> None:
            raise Unavailable("out of order")

        s.workers["p1"].script.hooks["prefill"] = fail
        for _ in range(20):
            answer = await s.ask()
            assert answer.summary is not None and answer.text == {0: "hello world"}
        assert s.workers["p1"].seen.count("prefill") == 3
        explained = await s.stub.Explain(request())
        [circuit] = explained.circuits
        assert (circuit.leg, circuit.workers, circuit.cause) == ("prefill", ["p1"], "unavailable")
        assert (circuit.state, circuit.failures) == ("open", 3) and 0 < circuit.retry_after_s <= 2
        assert {c.prefill_worker for c in explained.candidates} == {"p2", ""}
        text = (await s.stub.Metrics(inference_pb2.MetricsRequest())).text
        assert 'pagewire_circuits_open{instance="router",leg="prefill"} 1.0' in text
        assert 'pagewire_circuits_opened_total{cause="unavailable",instance="router",leg="prefill"} 1.0' in text
        await s.settle()


async def test_a_lost_transfer_blocks_the_pair_and_neither_worker(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1 d2") as s:

        def lose(worker: FakeWorker) -> None:
            raise TransferLost("the lane broke")

        s.workers["p1"].script.hooks["first_token"] = lose
        answer = await s.ask()
        assert answer.text == {0: "hello world"}
        del s.workers["p1"].script.hooks["first_token"]
        explained = await s.stub.Explain(request())
        lost = {tuple(c.workers) for c in explained.circuits}
        assert lost and lost <= {("p1", "d1"), ("p1", "d2")}
        pairs = {(c.prefill_worker, c.decode_worker) for c in explained.candidates if c.prefill_worker}
        assert pairs == {("p1", "d1"), ("p1", "d2")} - lost
        await s.settle()


def arguments(*words: str) -> argparse.Namespace:
    parser = Parser(environ={})
    add_subcommand(parser.add_subparsers())
    return parser.parse_args(["explain", "hello", *words])


async def test_the_command_prints_a_table_or_json(
    byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        capsys.readouterr()
        await explain(arguments("--router", s.address, "--max-tokens", "7"))
        head, _, columns, first, *rest = capsys.readouterr().out.splitlines()
        assert head == "5 prompt tokens, 7 expected of each choice; policy pagewire, costs in ms"
        assert columns.split()[:3] == ["prefill", "decode", "cost"]
        assert first.split()[:3] == ["*", "p1", "d1"]
        assert [line.split()[:2] for line in rest[-2:]] == [["d1", "decode"], ["p1", "prefill"]]
        await explain(arguments("--router", s.address, "--json"))
        told = json.loads(capsys.readouterr().out)
        assert told["candidates"][0]["decode_worker"] == "d1" and told["circuits"] == []
        with pytest.raises(StartupError, match="context length"):
            await explain(arguments("--router", s.address, "--max-tokens", "9999"))
    with pytest.raises(StartupError, match="did not answer"):
        await explain(arguments("--router", s.address))


def test_the_command_has_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    assert "--router HOST:PORT" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["explain", "hello"])
    assert "--router" in capsys.readouterr().err


async def test_an_invalid_request_is_refused_as_generate_refuses_it(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        with pytest.raises(grpc.RpcError) as caught:
            await s.stub.Explain(request(model="other"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_predictions_are_held_against_what_came(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        await s.ask()
        await s.settle()
        text = (await s.stub.Metrics(inference_pb2.MetricsRequest())).text
        for term in ("ttft", "transfer"):
            for name in ("predicted", "prediction_error"):
                line = f'pagewire_{name}_seconds_count{{instance="router",plan="pair",term="{term}"}} 1.0'
                assert line in text, line
