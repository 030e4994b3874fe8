"""The scheduler's decisions on random workloads, held to the rules it promises."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_core.block_hash import PageKeys
from pagewire_engine.config import EngineConfig
from pagewire_engine.decode_rows import DecodeRows
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.scheduler import Decision, Pool, Running, decide
from pagewire_engine.sequence import Request, Sequence

CONFIG = EngineConfig(max_model_len=512, block_size=16, num_blocks=64, max_num_seqs=6, max_num_batched_tokens=50)


def sequence(num_tokens: int, num_computed: int = 0, blocks: range = range(0), n: int = 1) -> Sequence:
    request = Request("r", [0] * num_tokens, b"r" * 32, SamplingParams(), n, lambda event: None)
    request.forked = num_computed > 0
    return Sequence(request, 0, [0] * num_tokens, num_tokens, PageKeys(b"r" * 32, 16), num_computed, num_computed,
                    block_table=list(blocks))  # fmt: skip


def running(seed: Seq[tuple[int, int]], drafts: Seq[int] = (), handed_over: int = 0) -> Running:
    """(tokens, uncomputed) each, with all the blocks that its computed tokens need, none shared.

    One uncomputed token: it decodes, with as many draft tokens as `drafts` says. The first `handed_over` of all
    have not waited here.
    """
    rows, order, prompts, drafted, start = DecodeRows(1), dict[Sequence, None](), [], [], 0
    for num_tokens, uncomputed in seed:
        num_computed = max(num_tokens - uncomputed, 0)
        held = CONFIG.blocks_for(num_tokens if uncomputed > 1 else num_computed)
        seq = sequence(num_tokens, num_computed, range(start, start + held))
        start += held
        seq.queued = len(order) >= handed_over
        order[seq] = None
        if uncomputed > 1:
            prompts.append(seq)
            continue
        rows.join(seq, (0, 0, num_computed, held * 16, 512, 0, 0, 0))
        seq.draft = [0] * (drafts[seq.row] if seq.row < len(drafts) else 0)
        drafted += [seq] * bool(seq.draft)
    return Running(rows, rows.ready(0), drafted, order, prompts)


def pool(free: int, reserved: int = 0, recheck: bool = True) -> Pool:
    return Pool(free, reserved, lookup=lambda seq: [], ref_count=lambda block: 1, recheck=recheck)


def decode(state: Running, decision: Decision) -> list[Sequence]:
    return [state.rows.sequences[row] for row in decision.decode]


def admitted(decision: Decision) -> list[tuple[Sequence, int]]:
    return [(admission.seq, admission.chunk) for admission in decision.admitted]


def is_nothing_but_preempted(decision: Decision) -> bool:
    return not (len(decision.decode) or decision.growing or decision.drafted or decision.chunks or decision.admitted)


def test_decoding_sequences_go_first_and_prompts_fill_the_budget() -> None:
    state = running([(90, 60), (33, 1)])
    prefilling, decoding = state.order
    decision = decide(state, [], pool(9), CONFIG)
    assert decode(state, decision) == [decoding]
    assert decision.chunks == ((prefilling, 49),)


def test_waiting_prompts_join_in_order_while_budget_and_blocks_last() -> None:
    waiting = [sequence(30), sequence(30), sequence(5)]
    decision = decide(running([]), waiting, pool(64), CONFIG)
    assert admitted(decision) == [(waiting[0], 30), (waiting[1], 20)]


def test_no_further_prompt_joins_a_step_that_has_enough_of_them() -> None:
    """The first token of each comes at the step's end: who waits for others' prompts gains nothing by it."""
    config = replace(CONFIG, enough_prompt_tokens=30)
    waiting = [sequence(20), sequence(25), sequence(5)]
    assert admitted(decide(running([]), waiting, pool(64), config)) == [(waiting[0], 20), (waiting[1], 25)]
    assert admitted(decide(running([]), [sequence(30), sequence(5)], pool(64), config))[1:] == []
    begun = decide(running([(64, 32), (33, 1)]), [sequence(5)], pool(64), config)
    assert begun.chunks[0][1] == 32 and not begun.admitted
    assert decide(running([(60, 28), (33, 1)]), [sequence(5)], pool(64), config).admitted


def test_a_prompt_that_does_not_fit_holds_up_those_behind_it() -> None:
    """First come, first served: a stream of short prompts must not starve a long one."""
    waiting = [sequence(400), sequence(5)]
    decision = decide(running([]), waiting, pool(8), CONFIG)
    assert not decision.admitted and decision.refused == (waiting[0], 25)


def test_a_refused_prompt_is_looked_up_again_only_when_it_might_fit() -> None:
    """The lookup of a long prompt that waits cost its length in every step."""
    looked_up: list[Sequence] = []
    refused = sequence(400)
    refused.wanted_blocks = 25

    def lookup(seq: Sequence) -> list[int]:
        looked_up.append(seq)
        return []

    for free, recheck, times in ((24, False, 0), (24, True, 1), (25, False, 2)):
        decision = decide(running([]), [refused], Pool(free, 0, lookup, lambda block: 1, recheck), CONFIG)
        assert bool(decision.admitted) == (free == 25)
        assert len(looked_up) == times


def test_blocks_promised_to_transfers_are_not_given_to_new_prompts() -> None:
    assert not decide(running([]), [sequence(30)], pool(3, reserved=2), CONFIG).admitted
    assert len(decide(running([]), [sequence(30)], pool(3, reserved=1), CONFIG).admitted) == 1


def test_a_prompt_with_n_choices_needs_n_seats() -> None:
    assert not decide(running([(20, 1)] * 4), [sequence(5, n=3)], pool(60), CONFIG).admitted
    assert len(decide(running([(20, 1)] * 3), [sequence(5, n=3)], pool(60), CONFIG).admitted) == 1


def test_whose_kv_came_with_them_take_no_place_of_those_that_wait() -> None:
    """A stream of them once kept a resumed answer waiting until there were no more: theirs is no queue."""
    assert not decide(running([(20, 1)] * 8, handed_over=2), [sequence(5)], pool(60), CONFIG).admitted
    waiting = [sequence(5), sequence(5)]
    assert admitted(decide(running([(20, 1)] * 8, handed_over=3), waiting, pool(60), CONFIG)) == [(waiting[0], 5)]


def test_the_last_to_arrive_is_preempted_when_blocks_run_out() -> None:
    state = running([(17, 1), (40, 1)])  # the first needs a second block and none is free
    _, last = state.order
    decision = decide(state, [sequence(5)], pool(0), CONFIG)
    assert decision.preempted == (last,)
    assert is_nothing_but_preempted(decision)


def test_a_prompt_for_another_worker_keeps_its_blocks_whoever_lacks_one() -> None:
    """Once computed anew, its KV was sent out of blocks where it was not yet: wrong tokens, with a right checksum."""
    state = running([(17, 1), (90, 60), (17, 1)])
    _, sent, last = state.order
    sent.request.prefill_only = True
    assert decide(state, [], pool(1), CONFIG).preempted == (last,)
    alone = running([(17, 1), (90, 60)])
    [first, sent] = alone.order
    sent.request.prefill_only = True
    assert decide(alone, [], pool(0), CONFIG).preempted == (first,)


def test_as_many_decoding_sequences_as_the_budget_has_tokens_leave_prompts_a_block_of_it() -> None:
    """Prompts had what they left, which was nothing until enough answers had ended."""
    config = replace(CONFIG, max_num_batched_tokens=20)
    state = running([(20, 1)] * 20, handed_over=20)
    decision = decide(state, [sequence(30)], pool(64), config)
    assert len(decision.decode) == 10 and [chunk for _, chunk in admitted(decision)] == [10]
    begun = decide(running([(90, 60), *[(20, 1)] * 25], handed_over=26), [], pool(64), config)
    assert len(begun.decode) == 10 and [chunk for _, chunk in begun.chunks] == [10]
    assert len(decide(state, [sequence(5, n=7)], pool(64), config).decode) == 20, "nobody could join"
    assert len(decide(state, [sequence(5, n=6)], pool(64), config).decode) == 10, "all the seats are free"
    many = decide(running([(20, 1)] * 60, handed_over=60), [sequence(30)], pool(99), CONFIG)
    assert len(many.decode) == 34, "a block of the budget, where that is less than half of it"


def test_drafts_leave_prompts_their_block_too() -> None:
    """Where they took it, a prompt waited until enough answers had ended."""
    state = running([(20, 1)] * 5, drafts=[9] * 5, handed_over=5)
    assert len(decide(state, [], pool(64), CONFIG).drafted) == 5
    decision = decide(state, [sequence(30)], pool(64), CONFIG)
    assert len(decision.drafted) == 3 and len(decision.decode) == 2
    assert [chunk for _, chunk in admitted(decision)] == [18]


def test_prompts_beside_decoding_sequences_keep_to_their_limit() -> None:
    state, alone = running([(90, 60), (33, 1)]), running([(90, 60)])
    [prefilling, _] = state.order
    assert decide(state, [sequence(5)], pool(9), CONFIG, 16).chunks == ((prefilling, 16),)
    assert decide(alone, [], pool(9), CONFIG, 16).chunks[0][1] == 50
    joining = decide(running([(33, 1)]), [sequence(30)], pool(9), CONFIG, 16)
    assert [chunk for _, chunk in admitted(joining)] == [16]


def test_drafts_take_what_is_left_and_nobody_goes_for_them() -> None:
    state = running([(17, 1), (33, 1)], drafts=[3, 16])
    first, second = state.order
    decision = decide(state, [], pool(2), CONFIG)  # each needs a block anyway; the second's draft another one
    assert decision.drafted == (first,) and decode(state, decision) == [second]
    assert decision.growing == (second,) and not decision.preempted
    assert set(decide(state, [], pool(3), CONFIG).drafted) == {first, second}
    assert set(decide(state, [], pool(3, reserved=1), CONFIG).drafted) == {first}


STATES = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 80)).map(lambda t: (max(t), min(t))), max_size=6)


@settings(max_examples=300)
@given(
    STATES,
    st.lists(st.integers(0, 20), max_size=6),
    st.lists(st.integers(1, 150), max_size=6),
    st.integers(0, 20),
    st.integers(0, 5),
    st.sampled_from([None, 16, 32]),
    st.booleans(),
)
def test_every_decision_keeps_the_rules(
    now: list[tuple[int, int]],
    drafts: list[int],
    queue: list[int],
    free: int,
    reserved: int,
    limit: int | None,
    for_others: bool,
) -> None:
    state, waiting = running(now, drafts), [sequence(length) for length in queue]
    sequences = list(state.order)
    for seq in state.prompts:
        seq.request.prefill_only = for_others
    decision = decide(state, waiting, pool(free, reserved), CONFIG, limit)
    if decision.preempted:
        may_go = [seq for seq in sequences if not seq.request.prefill_only]
        survivors = [seq for seq in may_go if seq not in decision.preempted]
        assert {*decision.preempted} <= {*may_go}, "blocks that a transfer reads were taken"
        assert survivors == may_go[: len(survivors)], "somebody who came earlier was preempted"
        assert is_nothing_but_preempted(decision)
        return
    chunks = [*decision.chunks, *admitted(decision)]
    prefill = sum(chunk for _, chunk in chunks)
    rows = len(decision.decode) + sum(1 + len(seq.draft) for seq in decision.drafted)
    assert rows + prefill <= CONFIG.max_num_batched_tokens
    assert prefill <= (limit or 50) or not rows
    assert all(0 < chunk <= len(seq.tokens) - seq.num_scheduled for seq, chunk in chunks)
    assert [admission.seq for admission in decision.admitted] == waiting[: len(decision.admitted)]
    assert len(sequences) + len(decision.admitted) <= CONFIG.max_num_seqs
    need = {seq: seq.num_computed + 1 for seq in decode(state, decision)}
    need |= {seq: seq.num_computed + 1 + len(seq.draft) for seq in decision.drafted}
    grown = {seq: CONFIG.blocks_for(tokens) - len(seq.block_table) for seq, tokens in need.items()}
    assert {seq for seq in grown if grown[seq] > 0} - {*decision.drafted} == {*decision.growing}
    taken = sum(CONFIG.blocks_for(len(admission.seq.tokens)) for admission in decision.admitted)
    assert sum(max(blocks, 0) for blocks in grown.values()) + taken <= free
    assert need.keys() == {*state.rows.sequences}, "a decoding sequence was held up"
