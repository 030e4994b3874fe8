from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import common_pb2
from pagewire_router.cost import Ask, LinkRates, Load, Plan, choose, plans

PREFILL, DECODE, BOTH = (
    common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH,
)  # fmt: skip
MODEL = b"f" * 32
RATES = LinkRates()


def load(worker_id: str, role: int, **facts: object) -> Load:
    return Load(worker_id, role, **{"fingerprint": MODEL, "kv_bytes_per_token": 1000, **facts})  # type: ignore[arg-type]


def best(prompt: int, *loads: Load) -> tuple[str | None, str]:
    first = plans(Ask(prompt), loads, RATES)[0]
    return first.prefill, first.decode


def test_a_pair_serves_even_one_token() -> None:
    assert best(1, load("p", PREFILL), load("d", DECODE)) == ("p", "d")
    assert len(plans(Ask(1), [load("p", PREFILL), load("d", DECODE)], RATES)) == 1


def test_a_decode_worker_computes_the_prompt_when_nobody_else_can() -> None:
    assert best(500, load("d", DECODE)) == (None, "d")
    other_model = load("p", PREFILL, fingerprint=b"g" * 32)
    assert best(500, other_model, load("d", DECODE)) == (None, "d")


def test_a_decode_worker_that_has_nearly_all_of_the_prompt_computes_the_rest() -> None:
    assert best(130, load("p", PREFILL), load("d", DECODE, hit_tokens=128)) == (None, "d")
    assert best(200, load("p", PREFILL), load("d", DECODE, hit_tokens=128)) == ("p", "d")
    assert best(63, load("p", PREFILL), load("d", DECODE)) == ("p", "d")


def test_without_a_decode_worker_there_is_no_plan() -> None:
    assert plans(Ask(10), [load("p", PREFILL)], RATES) == []
    assert plans(Ask(10), [], RATES) == []


def test_a_worker_of_both_roles_serves_alone_and_never_pairs_with_itself() -> None:
    assert best(1000, load("b", BOTH)) == (None, "b")
    found = {(p.prefill, p.decode) for p in plans(Ask(1000), [load("a", BOTH), load("b", BOTH)], RATES)}
    assert found == {(None, "a"), (None, "b"), ("a", "b"), ("b", "a")}
    short = {p.prefill for p in plans(Ask(10), [load("a", BOTH), load("b", BOTH)], RATES)}
    assert short == {None}


def test_a_busy_both_worker_leaves_a_long_prompt_to_another() -> None:
    """Chunks of a long prompt delay every sequence that decodes on the same worker."""
    busy = load("b", BOTH, num_sequences=20)
    assert best(4000, busy, load("p", PREFILL)) == ("p", "b")


def test_queues_hits_and_slow_links_decide_between_prefill_workers() -> None:
    d = load("d", DECODE)
    assert best(512, load("p", PREFILL, waiting_tokens=4000), load("q", PREFILL), d) == ("q", "d")
    assert best(512, load("p", PREFILL, hit_tokens=448), load("q", PREFILL), d) == ("p", "d")
    rates = LinkRates()
    for _ in range(20):
        rates.observe("p", "d", 1 << 20, 10.0)
    assert plans(Ask(512), [load("p", PREFILL), load("q", PREFILL), d], rates)[0].prefill == "q"


def test_room_and_load_decide_between_decode_workers() -> None:
    p = load("p", PREFILL)
    assert best(512, p, load("d", DECODE, num_sequences=30), load("e", DECODE)) == ("p", "e")
    assert best(512, p, load("d", DECODE, free_tokens=100), load("e", DECODE, num_sequences=30)) == ("p", "e")


def test_equal_plans_share_the_work_and_worse_ones_get_none() -> None:
    candidates = [Plan(None, "a", 100.0), Plan(None, "b", 102.9), Plan(None, "c", 103.1)]
    chosen = {choose(candidates, random.Random(seed)).decode for seed in range(50)}
    assert chosen == {"a", "b"}


def test_small_transfers_say_nothing_about_a_link() -> None:
    rates = LinkRates()
    before = rates("p", "d")
    rates.observe("p", "d", 100, 1.0)
    rates.observe("p", "d", 1 << 20, 0.0)
    assert rates("p", "d") == before


@given(
    prompt=st.integers(1, 5000),
    roles=st.lists(st.tuples(st.sampled_from([PREFILL, DECODE, BOTH]), st.integers(0, 6000)), max_size=5),
)
def test_every_plan_can_be_carried_out(prompt: int, roles: list[tuple[int, int]]) -> None:
    loads = {f"w{i}": load(f"w{i}", role, hit_tokens=hit) for i, (role, hit) in enumerate(roles)}
    found = plans(Ask(prompt), list(loads.values()), RATES)
    assert bool(found) == any(w.can_decode for w in loads.values())
    for plan in found:
        assert loads[plan.decode].can_decode
        assert plan.prefill != plan.decode
        assert plan.prefill is None or loads[plan.prefill].can_prefill
        assert plan.cost_ms > 0
