"""The scheduler's decisions on random workloads, held to the rules it promises."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_core.block_hash import PageKeys
from pagewire_engine.config import EngineConfig
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.scheduler import Decision, Pool, blocks_to_grow, decide
from pagewire_engine.sequence import Request, Sequence

CONFIG = EngineConfig(max_model_len=512, block_size=16, num_blocks=64, max_num_seqs=6, max_num_batched_tokens=50)


def sequence(num_tokens: int, num_computed: int = 0, blocks: range = range(0), n: int = 1) -> Sequence:
    request = Request("r", [0] * num_tokens, b"r" * 32, SamplingParams(), n, lambda event: None)
    request.forked = num_computed > 0
    return Sequence(request, 0, [0] * num_tokens, num_tokens, PageKeys(b"r" * 32, 16), num_computed,
                    block_table=list(blocks))  # fmt: skip


def running(seed: list[tuple[int, int]]) -> list[Sequence]:
    """(tokens, uncomputed) each, with all the blocks that its computed tokens need, none shared."""
    sequences, start = [], 0
    for num_tokens, uncomputed in seed:
        num_computed = max(num_tokens - uncomputed, 0)
        held = CONFIG.blocks_for(num_tokens if uncomputed > 1 else num_computed)
        sequences.append(sequence(num_tokens, num_computed, range(start, start + held)))
        start += held
    return sequences


def pool(free: int, reserved: int = 0) -> Pool:
    return Pool(free, reserved, lookup=lambda seq: [], ref_count=lambda block: 1)


def test_decoding_sequences_go_first_and_prompts_fill_the_budget() -> None:
    prefilling, decoding = running([(90, 60), (33, 1)])
    decision = decide([prefilling, decoding], [], pool(9), CONFIG)
    assert decision.scheduled == ((decoding, 1), (prefilling, 49))


def test_waiting_prompts_join_in_order_while_budget_and_blocks_last() -> None:
    waiting = [sequence(30), sequence(30), sequence(5)]
    decision = decide([], waiting, pool(64), CONFIG)
    assert decision.admitted == tuple(waiting[:2])
    assert decision.scheduled == ((waiting[0], 30), (waiting[1], 20))


def test_a_prompt_that_does_not_fit_holds_up_those_behind_it() -> None:
    """First come, first served: a stream of short prompts must not starve a long one."""
    decision = decide([], [sequence(400), sequence(5)], pool(8), CONFIG)
    assert decision == Decision()


def test_blocks_promised_to_transfers_are_not_given_to_new_prompts() -> None:
    assert decide([], [sequence(30)], pool(3, reserved=2), CONFIG).admitted == ()
    assert len(decide([], [sequence(30)], pool(3, reserved=1), CONFIG).admitted) == 1


def test_a_prompt_with_n_choices_needs_n_seats() -> None:
    assert decide(running([(20, 1)] * 4), [sequence(5, n=3)], pool(60), CONFIG).admitted == ()
    assert len(decide(running([(20, 1)] * 3), [sequence(5, n=3)], pool(60), CONFIG).admitted) == 1


def test_the_last_to_arrive_is_preempted_when_blocks_run_out() -> None:
    first, last = running([(17, 1), (40, 1)])  # the first needs a second block and none is free
    decision = decide([first, last], [sequence(5)], pool(0), CONFIG)
    assert decision.preempted == (last,)
    assert decision.scheduled == ((first, 1),)
    assert decision.admitted == ()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 80)).map(lambda t: (max(t), min(t))), max_size=6),
    st.lists(st.integers(1, 150), max_size=6),
    st.integers(0, 20),
    st.integers(0, 5),
)
def test_every_decision_keeps_the_rules(now: list[tuple[int, int]], queue: list[int], free: int, reserved: int) -> None:
    sequences, waiting = running(now), [sequence(length) for length in queue]
    decision = decide(sequences, waiting, pool(free, reserved), CONFIG)
    chunks = dict(decision.scheduled)
    assert sum(chunks.values()) <= CONFIG.max_num_batched_tokens
    assert all(0 < chunk <= seq.num_uncomputed for seq, chunk in chunks.items())
    assert list(decision.admitted) == waiting[: len(decision.admitted)]
    assert not set(decision.preempted) & set(chunks)
    assert not (decision.preempted and decision.admitted)
    survivors = [seq for seq in sequences if seq not in decision.preempted]
    assert survivors == sequences[: len(survivors)], "somebody who came earlier was preempted"
    assert len(survivors) + len(decision.admitted) <= CONFIG.max_num_seqs
    freed = sum(len(seq.block_table) for seq in decision.preempted)
    grown = sum(
        blocks_to_grow(seq, chunk, lambda block: 1, CONFIG) for seq, chunk in chunks.items() if seq in sequences
    )
    taken = sum(CONFIG.blocks_for(len(seq.tokens)) for seq in decision.admitted)
    assert grown + taken <= free + freed
    decoding = [seq for seq in survivors if seq.num_uncomputed == 1]
    assert all(seq in chunks for seq in decoding), "a decoding sequence was held up"
