from __future__ import annotations

from typing import Any

import pytest
from pagewire.v1 import common_pb2, worker_pb2
from pagewire_router.ledger import Booking, Ledger
from pagewire_router.room import UNBOUNDED, Room, room_of

ROLES = {
    "p": common_pb2.WORKER_ROLE_PREFILL, "d": common_pb2.WORKER_ROLE_DECODE, "b": common_pb2.WORKER_ROLE_BOTH,
}  # fmt: skip


def worker(role: str, ms_per_token: float = 0.0, **stats: Any) -> Ledger:
    info = worker_pb2.InfoResponse(worker_id=role, role=ROLES[role], block_size=16)
    made = Ledger(info)
    cost = worker_pb2.StepCost(prefill_ms_per_token=ms_per_token)
    made.report(worker_pb2.StatsResponse(**{"total_blocks": 100, "free_blocks": 100, **stats}, step_cost=cost))
    return made


def test_room_is_what_the_workers_have_together() -> None:
    workers = [worker("p"), worker("p", 0.05), worker("d", max_num_seqs=4), worker("d", max_num_seqs=8, free_blocks=9)]
    assert room_of(workers) == Room(
        sequences=15, prompt_tokens=4096 + 10_000, kv_tokens=1600, kv_pool=1600, num_prefill=2
    )


def test_nobody_waits_for_blocks_while_a_decode_worker_has_nobody_that_does() -> None:
    waits = worker("d", num_waiting=3)
    assert room_of([waits]).num_waiting == 3
    assert room_of([waits, worker("p", num_waiting=2), worker("d", num_waiting=1)]).num_waiting == 1


def test_what_is_on_its_way_to_a_worker_takes_its_room() -> None:
    decode = worker("d")
    with decode.booked(Booking(kv_tokens=600)):
        assert room_of([decode]).kv_tokens == 1000
    assert room_of([decode]).kv_tokens == 1600


@pytest.mark.parametrize(("roles", "num_prefill"), [("b", 1), ("pb", 2), ("pd", 1), ("dd", 2)])
def test_who_computes_prompts(roles: str, num_prefill: int) -> None:
    assert room_of([worker(role) for role in roles]).num_prefill == num_prefill


def test_without_decode_workers_there_are_no_bounds() -> None:
    assert room_of([worker("p")]) == Room()
    assert Room().sequences == UNBOUNDED
