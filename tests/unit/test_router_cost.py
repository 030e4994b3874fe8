from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import common_pb2
from pagewire_router.cost import MILLISECONDS, plans
from pagewire_router.links import Links
from pagewire_router.load import Ask, Load, Pool
from pagewire_router.plan import Plan

PREFILL, DECODE, BOTH = (
    common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH,
)  # fmt: skip
MODEL = b"f" * 32
LINKS = Links()


def load(worker_id: str, role: int, **facts: object) -> Load:
    return Load(worker_id, role, **{"fingerprint": MODEL, "kv_bytes_per_token": 1000, **facts})  # type: ignore[arg-type]


def found_by(ask: Ask, loads: list[Load], links: Links = LINKS) -> list[Plan]:
    return plans(ask, Pool.of(loads, ask), links)


def best(prompt: int, *loads: Load) -> tuple[str | None, str]:
    first = found_by(Ask(prompt), list(loads))[0]
    return first.prefill, first.decode


def test_a_pair_serves_even_one_token() -> None:
    assert best(1, load("p", PREFILL), load("d", DECODE)) == ("p", "d")
    assert len(found_by(Ask(1), [load("p", PREFILL), load("d", DECODE)])) == 1


def test_a_decode_worker_computes_the_prompt_when_nobody_else_can() -> None:
    assert best(500, load("d", DECODE)) == (None, "d")
    other_model = load("p", PREFILL, fingerprint=b"g" * 32)
    assert best(500, other_model, load("d", DECODE)) == (None, "d")


def test_a_decode_worker_that_has_nearly_all_of_the_prompt_computes_the_rest() -> None:
    assert best(130, load("p", PREFILL), load("d", DECODE, hit_tokens=128)) == (None, "d")
    assert best(200, load("p", PREFILL), load("d", DECODE, hit_tokens=128)) == ("p", "d")
    assert best(63, load("p", PREFILL), load("d", DECODE)) == ("p", "d")


def test_without_a_decode_worker_there_is_no_plan() -> None:
    assert found_by(Ask(10), [load("p", PREFILL)]) == []
    assert found_by(Ask(10), []) == []


def test_a_worker_of_both_roles_serves_alone_and_never_pairs_with_itself() -> None:
    assert best(1000, load("b", BOTH)) == (None, "b")
    found = {(p.prefill, p.decode) for p in found_by(Ask(1000), [load("a", BOTH), load("b", BOTH)])}
    assert found == {(None, "a"), (None, "b"), ("a", "b"), ("b", "a")}
    short = {p.prefill for p in found_by(Ask(10), [load("a", BOTH), load("b", BOTH)])}
    assert short == {None}


def test_a_busy_both_worker_leaves_a_long_prompt_to_another() -> None:
    """Chunks of a long prompt delay every sequence that decodes on the same worker."""
    busy = load("b", BOTH, num_sequences=20)
    assert best(4000, busy, load("p", PREFILL)) == ("p", "b")


def test_queues_hits_and_slow_links_decide_between_prefill_workers() -> None:
    d = load("d", DECODE)
    assert best(512, load("p", PREFILL, waiting_tokens=4000), load("q", PREFILL), d) == ("q", "d")
    assert best(512, load("p", PREFILL, hit_tokens=448), load("q", PREFILL), d) == ("p", "d")
    links = Links()
    for _ in range(20):
        links.observe("p", "d", 1 << 20, 10.0)
    assert found_by(Ask(512), [load("p", PREFILL), load("q", PREFILL), d], links)[0].prefill == "q"


def test_room_and_load_decide_between_decode_workers() -> None:
    p = load("p", PREFILL)
    assert best(512, p, load("d", DECODE, num_sequences=30), load("e", DECODE)) == ("p", "e")
    assert best(512, p, load("d", DECODE, free_tokens=100), load("e", DECODE, num_sequences=30)) == ("p", "e")


def test_equal_plans_share_the_work_and_worse_ones_get_none() -> None:
    candidates = [Plan(None, name, {"ms": ms}) for name, ms in (("a", 100.0), ("b", 102.9), ("c", 103.1))]
    chosen = {MILLISECONDS.choose(candidates, random.Random(seed)).decode for seed in range(50)}
    assert chosen == {"a", "b"}


@given(
    prompt=st.integers(1, 5000),
    roles=st.lists(st.tuples(st.sampled_from([PREFILL, DECODE, BOTH]), st.integers(0, 6000)), max_size=5),
)
def test_every_plan_can_be_carried_out(prompt: int, roles: list[tuple[int, int]]) -> None:
    loads = {f"w{i}": load(f"w{i}", role, hit_tokens=hit) for i, (role, hit) in enumerate(roles)}
    found = found_by(Ask(prompt), list(loads.values()))
    assert bool(found) == any(w.can_decode for w in loads.values())
    for plan in found:
        assert loads[plan.decode].can_decode
        assert plan.prefill != plan.decode
        assert plan.prefill is None or loads[plan.prefill].can_prefill
        assert plan.cost > 0
