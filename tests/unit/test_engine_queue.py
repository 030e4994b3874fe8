"""Who joins, who goes first, and what they find in the prefix cache."""

from __future__ import annotations

import pytest
from engines import ROOT, Run, run_all
from hash_model import HashRunner, expected
from pagewire_core.errors import Overloaded
from pagewire_engine.config import EngineConfig
from pagewire_engine.engine import Engine
from pagewire_engine.events import FirstTokens, Progress
from pagewire_engine.sampler import Sampled
from pagewire_engine.sequence import Sequence

MAX_LEN = 160


def engine_of(num_blocks: int, num_batched: int = 400) -> Engine:
    return Engine(HashRunner(num_blocks, 16), EngineConfig(MAX_LEN, 16, num_blocks, 8, num_batched))


def right(run: Run) -> bool:
    return run.tokens() == expected(run.request.prompt, run.request.params, 0, MAX_LEN)


def chunks(engine: Engine) -> list[Sequence]:
    """Sequences whose prompts were computed, in order."""
    assert isinstance(engine.runner, HashRunner)
    return [seq for batch in engine.runner.batches for seq, _ in batch.scheduled[batch.num_decode :]]


def test_a_prefix_that_one_counts_on_is_not_evicted_for_another_that_joins_in_the_same_step() -> None:
    engine = engine_of(12)
    for prompt in ([1] * 33, [2] * 112):  # the first's two blocks are the oldest of the cache
        run_all(engine, Run(prompt, max_tokens=1))
    other, again = Run([3] * 70, max_tokens=2), Run([1] * 33, max_tokens=2)
    run_all(engine, other, again)
    assert engine.counters.prompt_tokens_cached == 32
    assert right(other) and right(again)


def test_who_was_preempted_comes_before_those_that_wait() -> None:
    engine = engine_of(8)
    first, second = Run([1] * 50, max_tokens=60), Run([2] * 40, max_tokens=60)
    engine.submit(first.request)
    engine.submit(second.request)
    engine.step()
    waiting = Run([3] * 20, max_tokens=3)
    run_all(engine, waiting)
    assert engine.counters.preemptions > 0
    assert [seq.request for seq in chunks(engine)] == [
        run.request for run in (first, second, *[second] * engine.counters.preemptions, waiting)
    ]
    assert right(first) and right(second) and right(waiting)


def test_a_prompt_for_another_worker_stays_computed_while_others_want_its_blocks() -> None:
    """Its KV is read while it is computed, and stays where it is until the transfer is over."""
    engine = engine_of(16, num_batched=6)
    decoding = [Run([i] * 44, max_tokens=40) for i in (1, 2)]
    for run in decoding:
        engine.submit(run.request)
    while not all(run.tokens() for run in decoding):
        engine.step()
    sent = Run([3] * 100, prefill_only=True)
    engine.submit(sent.request)
    engine.step()
    table = engine.block_table(sent.request)
    while engine.step():
        engine.check()
        assert engine.block_table(sent.request) == table
    assert engine.counters.preemptions > 0
    told = [event.num_computed for event in sent.events if isinstance(event, Progress)]
    assert told == sorted(told) and told[-1] == 100
    assert isinstance(sent.events[-1], FirstTokens)
    engine.cancel(sent.request)
    run_all(engine)
    assert all(right(run) for run in decoding)


def test_who_waits_is_not_held_up_by_those_that_come_with_their_kv() -> None:
    """The queue looked at all that ran, and those never at the queue: it stood for as long as enough of them came."""
    engine = engine_of(60)
    arrived = [Run([i] * 10, max_tokens=20) for i in range(8)]
    for run in arrived:
        hand_over(engine, run)
    waiting, choices = Run([20] * 10, max_tokens=20), Run([21] * 10, n=7, max_tokens=20)
    one_too_many = Run([22] * 10, max_tokens=20)
    for run in (waiting, choices, one_too_many):
        engine.submit(run.request)
    for _ in range(3):
        engine.step()
    assert waiting.tokens() and choices.tokens() and not one_too_many.events
    run_all(engine)
    assert right(one_too_many) and all(right(run) for run in (*arrived, waiting))


def hand_over(engine: Engine, run: Run) -> None:
    """As if another worker had computed the prompt."""
    prompt = run.request.prompt
    engine.external.pin_prefix(run, [], ROOT)
    engine.external.bind(run, len(prompt))
    table = engine.external.unbind(run)
    engine.runner.cache.tokens[table[0], : len(prompt)] = prompt
    first = expected(prompt, run.request.params, 0, MAX_LEN)[0]
    engine.start_transferred(run.request, table, [Sampled(first)])


def test_who_comes_later_is_promised_nothing_that_the_first_in_the_queue_waits_for() -> None:
    engine = engine_of(10)
    short, long = Run([1] * 60, max_tokens=20), Run([2] * 100, max_tokens=3)
    engine.submit(short.request)
    engine.step()
    engine.submit(long.request)
    engine.step()
    assert engine.load()["free_blocks"] == 6 and not long.events
    with pytest.raises(Overloaded, match="2 KV blocks wanted, 0 free"):
        engine.external.reserve(2)
    run_all(engine)
    engine.external.reserve(2)
    assert right(short) and right(long)


def test_a_prompt_too_large_for_now_gets_its_place_as_soon_as_there_is_room() -> None:
    engine = engine_of(10)
    short, long = Run([1] * 60, max_tokens=20), Run([2] * 100, max_tokens=3)
    engine.submit(short.request)
    engine.step()
    engine.submit(long.request)
    while not long.events:
        engine.step()
    assert len(short.tokens()) == 20, "it needs seven blocks, and six are free beside five"
    run_all(engine)
    assert right(short) and right(long)
