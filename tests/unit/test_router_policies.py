"""Policies by name, each against its formula."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import common_pb2
from pagewire_core.flags import FLAGS
from pagewire_router.links import Links
from pagewire_router.load import Ask, Load, Pool
from pagewire_router.plan import Plan
from pagewire_router.policies import POLICIES

PREFILL, DECODE, BOTH = (
    common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH,
)  # fmt: skip
ROLE = {"p": PREFILL, "q": PREFILL, "d": DECODE, "e": DECODE, "b": BOTH, "c": BOTH}


def worker(name: str, **facts: object) -> Load:
    return Load(name, ROLE[name[0]], b"f" * 32, **facts)  # type: ignore[arg-type]


def ranked(policy: str, ask: Ask, *loads: Load) -> list[Plan]:
    return POLICIES[policy].plans(ask, Pool.of(loads, ask), Links())


def best(policy: str, prompt: int, *loads: Load) -> tuple[str | None, str]:
    plan = ranked(policy, Ask(prompt), *loads)[0]
    return plan.prefill, plan.decode


def test_every_policy_has_a_flag_value_and_every_flag_value_a_policy() -> None:
    assert FLAGS["routing-policy"].choices == tuple(POLICIES)


def test_round_robin_takes_each_in_turn() -> None:
    turns = dict.fromkeys(("p1", "p2", "p3", "d1", "d2"), 0)
    seen: Counter[str] = Counter()
    for turn in range(1, 13):
        prefill, decode = best("round_robin", 500, *(worker(name, turn=last) for name, last in turns.items()))
        assert prefill
        seen.update((prefill, decode))
        turns[prefill] = turns[decode] = turn
    assert seen == {"p1": 4, "p2": 4, "p3": 4, "d1": 6, "d2": 6}


def test_least_loaded_counts_what_waits_and_what_runs_and_nothing_else() -> None:
    busy = [worker("p1", waiting_tokens=5000, hit_tokens=500), worker("d1", num_sequences=9)]
    idle = [worker("p2", waiting_tokens=4000), worker("d2", num_sequences=8)]
    assert best("least_loaded", 512, *busy, *idle) == ("p2", "d2")


def test_prefix_goes_where_the_prompt_is_however_busy() -> None:
    warm = [worker("p1", hit_tokens=64, waiting_tokens=10**6), worker("d1", hit_tokens=64, num_sequences=99)]
    cold = [worker("p2"), worker("d2")]
    assert best("prefix", 512, *warm, *cold) == ("p1", "d1")
    assert best("prefix", 512, worker("p1", waiting_tokens=64), worker("p2"), *cold[1:]) == ("p2", "d2")


def test_dynamo_counts_blocks_to_compute_less_overlap_and_blocks_held() -> None:
    """cost = max(0, raw_prefill_blocks - overlap) + decode_blocks, with blocks of 64 tokens."""
    p, d = worker("p", waiting_tokens=640, hit_tokens=128, kv_tokens=192), worker("d", kv_tokens=1280)
    [plan] = ranked("dynamo", Ask(512), p, d)
    assert plan.terms == {"prefill_blocks_p": 10 + 8 - 2, "decode_blocks_p": 3, "decode_blocks_d": 20 + 8}
    assert best("dynamo", 512, p, d, worker("e", kv_tokens=640)) == ("p", "e")
    assert best("dynamo", 512, p, d, worker("q", waiting_tokens=1216)) == ("p", "d")
    assert best("dynamo", 512, p, d, worker("q", waiting_tokens=640)) == ("q", "d")


def test_llm_d_weighs_prefix_twice_and_queue_once_over_the_pool() -> None:
    """argmax of 2 * matched / total + (maxQ - q) / (maxQ - minQ); the decode worker first."""
    p = worker("p", num_waiting=4, hit_tokens=256)
    q = worker("q", num_waiting=0)
    [first, second] = ranked("llm_d", Ask(512), p, q, worker("d"))
    assert (first.prefill, second.prefill) == ("p", "q") or first.cost == second.cost
    assert {f.prefill: (f.terms["prefix_p"], f.terms["queue_p"]) for f in (first, second)} == {
        "p": (-1.0, 0.0),
        "q": (0.0, -1.0),
    }
    assert best("llm_d", 512, p, worker("q", num_waiting=0, hit_tokens=64), worker("d")) == ("q", "d")


def test_llm_d_leaves_prefill_out_when_less_than_16_tokens_are_missing() -> None:
    assert best("llm_d", 271, worker("p"), worker("d", hit_tokens=256)) == (None, "d")
    assert best("llm_d", 272, worker("p"), worker("d", hit_tokens=256)) == ("p", "d")


@pytest.mark.parametrize("policy", POLICIES)
def test_alone_nobody_computes_a_prompt_for_another(policy: str) -> None:
    loads = [worker(name, one_token=True) for name in ("p", "b", "c", "d")]
    for ask, able in ((Ask(500), {"b", "c", "d"}), (Ask(500, output_tokens=1, one_token=True), {"p", "b", "c", "d"})):
        plans = POLICIES[policy].plans(ask, Pool.of(loads, ask, alone=True), Links())
        assert {(plan.prefill, plan.decode) for plan in plans} == {(None, name) for name in able}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefill_worker_serves_one_token_alone_unless_it_has_no_room(policy: str) -> None:
    ask = Ask(500, output_tokens=1, one_token=True)
    p, d = worker("p", one_token=True), worker("d", num_sequences=4)
    assert ranked(policy, ask, p)[0].workers == ("p",)
    assert all(plan.prefill is None for plan in ranked(policy, ask, p, d))
    full = worker("p", one_token=True, free_tokens=100)
    assert {plan.decode for plan in ranked(policy, ask, full, d)} == {"d"}


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "pagewire"])
def test_a_worker_of_both_roles_computes_its_own_prompts(policy: str) -> None:
    assert {p.prefill for p in ranked(policy, Ask(512), worker("b"), worker("c"))} == {None}


@given(
    policy=st.sampled_from(list(POLICIES)),
    prompt=st.integers(1, 5000),
    one_token=st.booleans(),
    facts=st.lists(
        st.tuples(
            st.sampled_from("pdb"), st.integers(0, 6000), st.integers(0, 9000), st.integers(0, 200), st.booleans()
        ),
        max_size=7,
    ),
)
def test_every_plan_of_every_policy_can_be_carried_out(
    policy: str, prompt: int, one_token: bool, facts: list[tuple[str, int, int, int, bool]]
) -> None:
    loads = {
        f"{role}{i}": worker(
            f"{role}{i}", hit_tokens=hit, waiting_tokens=waiting, num_sequences=running, num_waiting=running // 2,
            free_tokens=1 << 20 if room else 0, one_token=hit % 2 == 0,
        )
        for i, (role, hit, waiting, running, room) in enumerate(facts)
    }  # fmt: skip
    ask = Ask(prompt, one_token=one_token)
    found = ranked(policy, ask, *loads.values())
    ends = {w.worker_id for w in loads.values() if w.can_decode or w.ends(ask)}
    assert bool(found) == bool(ends)
    roomy = any(loads[w].free_tokens for w in ends)
    for plan in found:
        assert plan.decode in ends and plan.prefill != plan.decode
        assert plan.prefill is None or loads[plan.decode].can_decode
        assert plan.prefill is None or loads[plan.prefill].can_prefill
        assert not roomy or loads[plan.decode].free_tokens, "a worker without room while another has some"
    if found:
        assert POLICIES[policy].choose(found, random.Random(0)).cost <= found[0].cost * 1.03 + 1
