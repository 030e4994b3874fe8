"""What the choice of workers learns, and how it gets to know that it was wrong."""

from __future__ import annotations

import asyncio

import pytest
from fakes import FakeWorker
from pagewire.v1 import common_pb2, worker_pb2
from pagewire_core.errors import Unavailable
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.request import validate
from router_scene import PROMPT, Scene, give_prefix, request, scene, until

_SLOW, _QUICK = 50.0, 0.01  # milliseconds of a token


async def _say(s: Scene, **milliseconds: float) -> None:
    """Workers say so of themselves."""
    for name, per_token in milliseconds.items():
        s.workers[name].step_cost = worker_pb2.StepCost(prefill_ms_per_token=per_token, decode_base_ms=1.0)
    for w in s.router.services.workers.live:
        if w.worker_id in milliseconds:
            await until(lambda w=w: w.model.prefill_ms_per_token == milliseconds[w.worker_id])  # type: ignore[misc]


async def _told(s: Scene, count: int) -> list[str]:
    """Who computed each of so many prompts."""
    answers = [await s.ask(f"question number {number}") for number in range(count)]
    return [answer.summary.prefill_worker if answer.summary else "?" for answer in answers]


async def test_a_prefill_worker_that_looks_slow_by_mistake_is_tried_now_and_then(byte_tokenizer: Tokenizer) -> None:
    """One that was held up while it measured itself never had work again, which alone could have shown the mistake."""
    async with scene(byte_tokenizer, "p1 d1") as s:
        await _say(s, p1=_SLOW, d1=_QUICK)
        told = await _told(s, 51)
        assert told.count("p1") == 3, told
        assert "p1" not in told[:15] and "p1" in told[15:17]
        await _say(s, p1=_QUICK)
        assert set(await _told(s, 5)) == {"p1"}


async def test_no_prompt_is_computed_anew_only_to_try_a_worker(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        await _say(s, p1=_SLOW, d1=_QUICK)
        await give_prefix(s, "d1")
        told = [(await s.ask(PROMPT)).summary for _ in range(20)]
        assert {summary.prefill_worker for summary in told if summary} == {""}


async def test_one_that_has_work_is_no_mistake(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        await _say(s, p1=_SLOW, d1=_QUICK)
        s.workers["p1"].waiting_prefill_tokens = 10
        [p1] = [w for w in s.router.services.workers.live if w.can_prefill]
        await until(lambda: p1.stats.waiting_prefill_tokens == 10)
        assert "p1" not in await _told(s, 40)


@pytest.mark.parametrize("change", ["leaves", "has another role"])
@pytest.mark.parametrize("known", [True, False], ids=["known before", "known after"])
async def test_what_a_worker_hands_over_leaves_no_circuit_open(
    byte_tokenizer: Tokenizer, change: str, known: bool
) -> None:
    """Nobody would try it again to close it: the count of open circuits, and its alarm, stayed until a restart."""
    async with scene(byte_tokenizer, "p1 d1 d2", routing_policy="round_robin") as s:
        d1, handing_over = s.workers["d1"], asyncio.Event()
        [known_as] = [w for w in s.router.services.workers.live if w.worker_id == "d1"]

        async def hand_over(worker: FakeWorker) -> None:
            await handing_over.wait()
            raise Unavailable("this worker stops to decode")

        d1.script.hooks["decode"] = hand_over
        asking = [asyncio.create_task(s.ask()) for _ in range(8)]
        await until(lambda: d1.seen.count("decode") == 4)
        if known:
            d1.draining, d1.role = change == "leaves", common_pb2.WORKER_ROLE_PREFILL
            await until(lambda: not known_as.can_decode)
        handing_over.set()
        assert [answer.text for answer in await asyncio.gather(*asking)] == [{0: "hello world"}] * 8
        assert len(list(s.router.services.placement.breakers)) == (not known)
        d1.draining, d1.role = change == "leaves", common_pb2.WORKER_ROLE_PREFILL
        await until(lambda: not known_as.can_decode)
        assert not list(s.router.services.placement.breakers)


async def test_a_request_waits_for_the_worker_that_can_run_as_many_choices(byte_tokenizer: Tokenizer) -> None:
    """While that one was full, it was put on a smaller one, and refused as if nobody could ever serve it."""
    async with scene(byte_tokenizer, "p1 d1 d2") as s:
        small, large = s.workers["d1"], s.workers["d2"]
        small.max_num_seqs = 2
        [known] = [w for w in s.router.services.workers.live if w.worker_id == "d1"]
        await until(lambda: known.stats.max_num_seqs == 2)
        going_on = asyncio.Event()
        large.script.hooks["decode_started"] = lambda worker: going_on.wait()
        first = asyncio.create_task(s.ask(n=8))
        await until(lambda: "decode_started" in large.seen)
        second = asyncio.create_task(s.ask("other", n=4))
        await until(lambda: len(large.requests) == 2)
        going_on.set()
        for answer, n in ((await first, 8), (await second, 4)):
            assert answer.text == dict.fromkeys(range(n), "hello world")
        assert "reserve" not in small.seen


async def test_what_began_on_a_worker_of_long_contexts_goes_on_on_such_a_one(byte_tokenizer: Tokenizer) -> None:
    """With one of shorter contexts that had come meanwhile, an answer ended with an error in its middle."""
    async with scene(byte_tokenizer, "p1 d1 d2") as s:
        lost = asyncio.Event()

        async def lose(worker: FakeWorker) -> None:
            await lost.wait()
            worker.script.hooks.clear()
            raise Unavailable("lost")

        for name in ("d1", "d2"):
            s.workers[name].script.hooks["decode"] = lose
        asking = asyncio.create_task(s.ask("a long prompt"))
        await until(lambda: any("decode" in s.workers[name].seen for name in ("d1", "d2")))
        long, short = sorted(("d1", "d2"), key=lambda name: "decode" not in s.workers[name].seen)
        old = s.workers[short]
        await old.kill()
        again = FakeWorker(short, old.role, old.script, old.peers)
        again.instance, again.address, again.max_model_len = f"{short}-2", old.address, 12
        await again.start()
        try:
            workers = s.router.services.workers
            await until(lambda: any(w.info.instance == again.instance for w in workers.live))
            lost.set()
            assert (await asking).text == {0: "hello world"}
            assert not again.seen, f"it went on on {short}, not on {long}"
        finally:
            await again.kill()


async def test_what_a_leg_does_well_is_learnt_while_the_answer_goes_on(byte_tokenizer: Tokenizer) -> None:
    """Who failed before begins anew, a transfer that works closes its circuit, and its time is the link's."""
    async with scene(byte_tokenizer, "p1 d1") as s:
        placement = s.router.services.placement
        placement.breakers.failed("prefill", "unavailable", "p1")
        placement.breakers.failed("transfer", "unavailable", "p1", "d1")
        for breaker, _, _ in placement.breakers:
            breaker.until = 0.0  # its back-off is over
        s.workers["p1"].script.wire_us = 10_000
        s.workers["d1"].script.hooks["decode"] = lambda worker: asyncio.sleep(60)
        answers = [asyncio.create_task(s.ask("x" * 100))]
        await until(lambda: not list(placement.breakers), 5)
        answers.append(asyncio.create_task(s.ask("y" * 100)))  # of the link the first says nothing
        await until(lambda: placement.links("p1", "d1").transfer_ms(100_000) > 5.0, 5)
        for answer in answers:
            answer.cancel()
        await s.settle()


async def test_of_many_sessions_the_last_ones_are_known(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagewire_router.placement._MAX_SESSIONS", 2)
    async with scene(byte_tokenizer, "d1") as s:
        for name in ("a", "b", "a", "c"):
            await s.ask(session_id=name)
        views = {
            n: s.router.services.placement.view(validate(request(session_id=n), s.router.model, 256)) for n in "abc"
        }
        assert {name: view.ask.previous for name, view in views.items()} == {"a": "d1", "b": None, "c": "d1"}
