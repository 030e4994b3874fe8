"""The loop over random mixes of requests: launched one step ahead or not, with guesses or without, the tokens
are those that a loop over each sequence alone would give, and every block comes back.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from threading import Thread

import pytest
from engines import Run, assert_empty, run_all
from hash_model import POISON, VOCABULARY, HashRunner, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_engine.config import EngineConfig
from pagewire_engine.continued import Continued
from pagewire_engine.engine import Engine
from pagewire_engine.events import Failed, Finished, FirstTokens, Token
from pagewire_engine.outbox import Outbox, deliver_outbox
from pagewire_engine.sampler import Sampled
from pagewire_engine.sequence import Sequence
from structlog.testing import capture_logs

MAX_LEN = 96


class HalfTruths:
    """Proposes what comes, or something else: as told by its own dice."""

    def __init__(self, seed: int, truth: float = 0.7) -> None:
        self._rng, self._truth = random.Random(seed), truth
        self.ended_once: set[Sequence] = set()
        self.proposed = self.accepted = 0

    def propose(self, sequences: Seq[Sequence]) -> list[list[int]]:
        assert not self.ended_once & {*sequences}
        return [self._guess(seq) for seq in sequences]

    def _guess(self, seq: Sequence) -> list[int]:
        coming = expected(seq.tokens[: seq.num_prompt], seq.request.params, seq.choice, MAX_LEN)
        coming = [*coming, 1, 2, 3, 4][seq.num_output :][: self._rng.randrange(5)]
        return [token if self._rng.random() < self._truth else self._rng.randrange(VOCABULARY) for token in coming]

    def observe(self, proposed: int, accepted: int, num_sequences: int, milliseconds: float) -> None:
        assert 0 <= accepted <= proposed and num_sequences > 0 and milliseconds > 0
        self.proposed += proposed
        self.accepted += accepted

    def ended(self, seq: Sequence) -> None:
        assert seq not in self.ended_once
        self.ended_once.add(seq)


@dataclass(frozen=True)
class Ask:
    """A request, and when it is sent and given up, in steps of the engine."""

    shared: int
    own: list[int]
    n: int
    max_tokens: int
    temperature: float
    frequency_penalty: float
    stop: frozenset[int]
    prefill_only: bool
    sent: int
    cancelled: int | None
    choices: tuple[int, ...]
    in_step: bool  # it is given up while a step is being launched

    def run(self, seed: int) -> Run:
        prompt = [token % 5 for token in range(self.shared)] + self.own
        return Run(
            prompt, n=self.n, max_tokens=self.max_tokens, temperature=self.temperature, seed=seed,
            frequency_penalty=self.frequency_penalty, stop_token_ids=self.stop, prefill_only=self.prefill_only,
        )  # fmt: skip


ASKS = st.builds(
    Ask,
    shared=st.sampled_from([0, 7, 16, 33]),
    own=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    n=st.sampled_from([1, 1, 2, 3]),
    max_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    stop=st.sampled_from([frozenset[int](), frozenset([7]), frozenset(range(6))]),
    prefill_only=st.sampled_from([False, False, False, True]),
    sent=st.integers(0, 12),
    cancelled=st.one_of(st.none(), st.none(), st.integers(0, 30)),
    choices=st.sampled_from([(), (0,), (1, 2)]),
    in_step=st.booleans(),
)


def drive(engine: Engine, asks: list[Ask]) -> list[Run]:
    """Sends, gives up and steps in lockstep; the books are checked after every step."""
    runs = [ask.run(seed) for seed, ask in enumerate(asks)]
    assert isinstance(engine.runner, HashRunner)
    for step in range(1000):
        for ask, run in zip(asks, runs, strict=True):
            if ask.sent == step:
                engine.submit(run.request)
            if ask.cancelled is not None and ask.sent + ask.cancelled == step:
                cancel = partial(engine.cancel, run.request, ask.choices)
                cancel() if not ask.in_step else engine.runner.during.append(cancel)
        progress = engine.step()
        engine.check()
        if not progress and step > 45:
            break
        for run in runs:  # the blocks are sent as soon as the first tokens are there
            if any(isinstance(event, FirstTokens) for event in run.events):
                engine.release(run.request)
    assert_empty(engine)
    return runs


def check_tokens(asks: list[Ask], runs: list[Run]) -> None:
    for ask, run in zip(asks, runs, strict=True):
        alone = [expected(run.request.prompt, run.request.params, c, MAX_LEN) for c in range(ask.n)]
        if ask.prefill_only:
            first = [event for event in run.events if isinstance(event, FirstTokens)]
            assert first or ask.cancelled is not None
            for event in first:
                assert [sampled.token for sampled in event.tokens] == [tokens[0] for tokens in alone]
            continue
        for choice in range(ask.n):
            said, given_up = run.tokens(choice), ask.cancelled is not None and choice in (ask.choices or range(3))
            assert said == (alone[choice][: len(said)] if given_up else alone[choice])
        ends = [event for event in run.events if isinstance(event, Token) and event.finish_reason is not None]
        if ask.cancelled is None:
            assert len(ends) == ask.n and isinstance(run.events[-1], Finished)


@settings(max_examples=120)
@given(
    asks=st.lists(ASKS, min_size=1, max_size=9),
    overlaps=st.booleans(),
    guesses=st.booleans(),
    num_blocks=st.sampled_from([7, 9, 14, 40]),
    num_seqs=st.sampled_from([3, 8]),
    num_batched=st.sampled_from([5, 24, 200]),
    caching=st.booleans(),
)
def test_any_mix_gives_every_sequence_the_tokens_it_would_get_alone(
    asks: list[Ask], overlaps: bool, guesses: bool, num_blocks: int, num_seqs: int, num_batched: int, caching: bool
) -> None:
    config = EngineConfig(MAX_LEN, 16, num_blocks, num_seqs, num_batched, caching)
    proposer = HalfTruths(len(asks)) if guesses else None
    engine = Engine(HashRunner(num_blocks, 16, overlaps=overlaps), config, proposer=proposer)
    check_tokens(asks, drive(engine, asks))
    counters = engine.counters
    if proposer:
        assert counters.accepted_tokens == sum(counters.accepted_per_position) >= proposer.accepted


def engine_of(
    num_blocks: int = 40, *, overlaps: bool = False, proposer: HalfTruths | None = None, budget: int = 64
) -> Engine:
    config = EngineConfig(MAX_LEN, 16, num_blocks, 8, budget)
    return Engine(HashRunner(num_blocks, 16, overlaps=overlaps), config, proposer=proposer)


def batches(engine: Engine) -> list[list[int]]:
    assert isinstance(engine.runner, HashRunner)
    return [batch.input_ids.tolist() for batch in engine.runner.batches]


def test_the_next_step_is_launched_before_the_tokens_of_the_last_are_known() -> None:
    engine = engine_of(overlaps=True)
    run = Run([1, 2, 3], max_tokens=4)
    run_all(engine, run)
    assert batches(engine) == [[1, 2, 3], [-1], [-1], [-1]], "max_tokens is known ahead: no step too many"
    assert run.tokens() == expected([1, 2, 3], run.request.params, 0, MAX_LEN)


def test_a_stop_token_costs_one_wasted_row_whose_token_nobody_hears_of() -> None:
    engine = engine_of(overlaps=True)
    alone = expected([1, 2, 3], Run([1], max_tokens=9).request.params, 0, MAX_LEN)
    run = Run([1, 2, 3], max_tokens=9, stop_token_ids=frozenset([alone[2]]))
    run_all(engine, run)
    assert run.tokens() == alone[:3]
    assert batches(engine) == [[1, 2, 3], [-1], [-1], [-1]]


def test_a_penalty_waits_for_the_token_it_depends_on() -> None:
    engine = engine_of(overlaps=True)
    run, other = Run([1, 2, 3], max_tokens=4, presence_penalty=1.0), Run([4, 4], max_tokens=8)
    run_all(engine, run, other)
    assert run.tokens() == expected([1, 2, 3], run.request.params, 0, MAX_LEN)
    assert other.tokens() == expected([4, 4], other.request.params, 0, MAX_LEN)


def test_a_block_whose_last_token_nobody_knows_is_not_kept() -> None:
    """A sequence that is cancelled in flight goes on by a token that is never read: its block has no name."""
    engine = engine_of(overlaps=True)
    run = Run([1] * 14, max_tokens=30)
    engine.submit(run.request)
    engine.step()
    engine.step()
    assert isinstance(engine.runner, HashRunner)
    engine.runner.during.append(lambda: engine.cancel(run.request))
    while engine.step():
        engine.check()
    assert_empty(engine)
    assert [batch.positions.tolist() for batch in engine.runner.batches][1:] == [[14], [15]]
    assert (engine.runner.cache.tokens == POISON).all()


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("lost", [1, 2, 5])
def test_a_lost_step_ends_its_requests_and_the_engine_goes_on(overlaps: bool, lost: int) -> None:
    engine = engine_of(overlaps=overlaps)
    runs = [Run([1, 2, 3, i], max_tokens=9, n=1 + i % 2) for i in range(4)]
    for run in runs:
        engine.submit(run.request)
    assert isinstance(engine.runner, HashRunner)
    compute, calls = engine.runner.compute, iter(range(1000))

    def broken(batch, before):  # type: ignore[no-untyped-def]
        if next(calls) == lost:
            raise RuntimeError("device lost")
        return compute(batch, before)

    engine.runner.compute = broken  # type: ignore[method-assign]
    with capture_logs():
        while engine.step():
            engine.check()
    assert_empty(engine)
    num_lost = engine.counters.prefill.lost + engine.counters.decode.lost
    assert num_lost >= 1 if overlaps else num_lost == 1, "those launched ahead need its tokens"
    failed = [run for run in runs if any(isinstance(event, Failed) for event in run.events)]
    assert failed and all(isinstance(run.events[-1], Failed) for run in failed)
    again = Run([1, 2, 3, 0], max_tokens=9)
    run_all(engine, again)
    assert again.tokens() == expected([1, 2, 3, 0], again.request.params, 0, MAX_LEN)


def test_true_guesses_save_steps_and_are_counted_by_position() -> None:
    proposer = HalfTruths(0, truth=1.0)
    engine = engine_of(proposer=proposer)
    run = Run([1, 2, 3], max_tokens=60)
    run_all(engine, run)
    assert run.tokens() == expected([1, 2, 3], run.request.params, 0, MAX_LEN)
    counters = engine.counters
    assert counters.accepted_tokens == counters.draft_tokens == proposer.accepted > 25
    assert counters.steps + counters.accepted_tokens == 60
    assert counters.accepted_per_sequence.total == counters.accepted_tokens
    assert counters.accepted_per_position == sorted(counters.accepted_per_position, reverse=True)
    assert [*proposer.ended_once] == run.request.sequences


def test_steps_in_which_sequences_join_others_are_told_from_those_that_begin_a_batch() -> None:
    engine = engine_of()
    runs = [Run([1, 2, i], max_tokens=9) for i in range(3)]
    for run in runs[:2]:
        engine.submit(run.request)
    for _ in range(3):
        engine.step()
    assert engine.max_running_tokens() == 2 * (3 + 9)
    run_all(engine, runs[2])
    counters = engine.counters
    assert (counters.admitted.total, counters.joins) == (3, 1) and counters.join_s.total > 0
    assert counters.decode.publish_s.total > 0 and engine.max_running_tokens() == 0


def test_nobody_is_preempted_for_a_guess() -> None:
    """Two sequences that fill the pool to the last block decode on, one token a step."""
    engine = engine_of(4, proposer=HalfTruths(0, truth=1.0))
    runs = [Run([i] * 20, max_tokens=12) for i in range(2)]
    run_all(engine, *runs)
    for run in runs:
        assert run.tokens() == expected(run.request.prompt, run.request.params, 0, MAX_LEN)
    assert engine.counters.preemptions == 0 and engine.counters.draft_tokens > 0


def test_more_transferred_sequences_than_seats_make_the_tables_grow() -> None:
    """Transfers are bounded by blocks, not by --max-num-seqs."""
    engine = engine_of()
    runs = [Run([i, i, i], max_tokens=20) for i in range(11)]
    assert isinstance(engine.runner, HashRunner)
    for run in runs:
        engine.external.pin_prefix(run, run.request.prompt, run.request.cache_root)
        [block] = engine.external.bind(run, 3)
        engine.runner.cache.tokens[block, :3] = run.request.prompt
        first = expected(run.request.prompt, run.request.params, 0, MAX_LEN)[0]
        engine.start_transferred(run.request, engine.external.unbind(run), [Sampled(first)])
    assert len(engine.runner.batches) == 0 and engine.load()["num_running"] == 11
    run_all(engine)
    for run in runs:
        assert run.tokens() == expected(run.request.prompt, run.request.params, 0, MAX_LEN)
    assert len(engine.runner.batches[0].tables) == 16


@pytest.mark.parametrize("overlaps", [False, True])
def test_more_decoding_sequences_than_a_step_may_have_tokens_take_turns(overlaps: bool) -> None:
    """The last ones stood still until others had ended."""
    engine = engine_of(overlaps=overlaps, budget=3)
    run = Run([1, 2, 3], n=8, max_tokens=30, ignore_eos=True, temperature=1.0)
    engine.submit(run.request)
    for _ in range(20):
        engine.step()
    assert min(len(run.tokens(choice)) for choice in range(8)) >= 20 // 3  # of 3 steps each has a place in one
    run_all(engine)
    for choice in range(8):
        assert run.tokens(choice) == expected(run.request.prompt, run.request.params, choice, MAX_LEN)


def test_what_two_threads_say_of_a_request_comes_in_the_order_in_which_it_came_about() -> None:
    """A first token that came with its KV was told after the second one, where a step was quicker than its thread; and
    the end of a request, which stopping its choices gave it, before the tokens of the step that had just landed."""
    interrupting: list[Callable[[], object]] = []

    def deliver(outbox: Outbox) -> None:
        if interrupting and any(isinstance(event, Token) for _, event in outbox):
            other = Thread(target=interrupting.pop())
            threads.append(other)
            other.start()
            other.join(0.2)
        deliver_outbox(outbox)

    threads: list[Thread] = []
    engine = Engine(HashRunner(40, 16), EngineConfig(MAX_LEN, 16, 40, 8, 64), deliver=deliver)
    run = Run([1, 2, 3], n=2, max_tokens=9, ignore_eos=True)
    first = [expected(run.request.prompt, run.request.params, choice, MAX_LEN)[0] for choice in range(2)]
    engine.external.pin_prefix(run, run.request.prompt, run.request.cache_root)
    [block] = engine.external.bind(run, 3)
    engine.runner.cache.tokens[block, :3] = run.request.prompt
    interrupting.append(engine.step)
    engine.start_transferred(run.request, engine.external.unbind(run), [Sampled(token) for token in first])
    threads[0].join()
    interrupting.append(lambda: engine.cancel(run.request, [0, 1]))
    engine.step()
    threads[1].join()
    for choice in range(2):
        assert run.tokens(choice) == expected(run.request.prompt, run.request.params, choice, MAX_LEN)[:3]
    assert [type(event) for event in run.events] == [Token] * 6 + [Finished]


def test_a_row_after_a_guess_sees_the_tokens_up_to_it_even_when_more_have_come() -> None:
    tokens = [1, 2]
    view = Continued(tokens, [3])
    tokens.append(9)
    assert len(view) == 3 and list(view) == [1, 2, 3] and view[1:] == [2, 3] and view[-1] == 3
