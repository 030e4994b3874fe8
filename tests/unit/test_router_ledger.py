"""A worker's account: its last report, and what was sent to it since."""

from __future__ import annotations

from pagewire.v1 import common_pb2, worker_pb2
from pagewire_router.ledger import Booking, Ledger
from pagewire_router.load import Load, StepModel

DECODE, BOTH = common_pb2.WORKER_ROLE_DECODE, common_pb2.WORKER_ROLE_BOTH
MEASURED = worker_pb2.StepCost(prefill_base_ms=1.0, decode_base_ms=2.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ledger(clock: Clock) -> Ledger:
    info = worker_pb2.InfoResponse(worker_id="w", role=DECODE, block_size=16, kv_bytes_per_token=8)
    made = Ledger(info, clock)
    made.report(stats())
    clock.now += 1
    return made


def stats(**changes: int) -> worker_pb2.StatsResponse:
    said = {
        "waiting_prefill_tokens": 1000, "waiting_prefill_attended": 5000, "num_waiting": 2, "num_running": 3,
        "waiting_transfers": 4, "running_kv_tokens": 600, "max_num_seqs": 32, "free_blocks": 50, "cached_blocks": 20,
    }  # fmt: skip
    return worker_pb2.StatsResponse(**(said | changes), step_cost=MEASURED)


def test_what_a_request_finds_is_what_was_reported_and_what_was_booked_since() -> None:
    worker = ledger(Clock())
    reported = Load(
        worker_id="w", role=DECODE, fingerprint=b"", model=StepModel.of(MEASURED), waiting_tokens=1000,
        waiting_attended=5000.0, num_waiting=2, num_sequences=3 + 2 + 4, kv_tokens=600, max_num_seqs=32,
        free_tokens=800, unused_tokens=480, kv_bytes_per_token=8,
    )  # fmt: skip
    assert worker.load(0) == reported
    assert worker.load(2).hit_tokens == 128
    with worker.booked(Booking(compute_tokens=100, cached_tokens=64, kv_tokens=164, num_sequences=2)):
        booked = worker.load(0)
        assert (booked.waiting_tokens, booked.waiting_attended) == (1100, 5000 + 100 * (64 + 50))
        assert (booked.num_waiting, booked.num_sequences, booked.kv_tokens) == (3, 11, 764)
        assert (booked.free_tokens, booked.unused_tokens) == (800 - 164, 480 - 164)
        with worker.booked(Booking(kv_tokens=500)):
            assert worker.load(0).unused_tokens == 0
    assert worker.load(0) == reported


def test_what_the_worker_reports_itself_is_not_counted_twice() -> None:
    clock = Clock()
    worker = ledger(clock)
    with worker.booked(Booking(kv_tokens=160)):
        worker.load(0)
        clock.now += 0.01
        worker.report(stats())  # made before the booking reached it, or so it may be
        assert worker.load(0).free_tokens == worker.free_kv_tokens == 640
        clock.now += 1
        worker.report(stats(free_blocks=40))
        assert worker.load(0).free_tokens == worker.free_kv_tokens == 640


def test_blocks_that_two_requests_make_are_coming_until_the_last_of_them_is_over() -> None:
    worker = ledger(Clock())
    with worker.booked(Booking(hashes=[b"a", b"b"])):
        with worker.booked(Booking(hashes=[b"a"])):
            assert worker.hits([b"a", b"b", b"c"], 0) == 2
        assert worker.hits([b"a", b"b", b"c"], 0) == 2
        assert worker.hits([b"c", b"a", b"b"], 1) == 3
        assert worker.hits([b"c", b"a"], 0) == 0
    assert worker.hits([b"a"], 0) == 0


def test_a_role_may_change_and_older_workers_do_not_say_theirs() -> None:
    worker = ledger(Clock())
    assert worker.can_decode and not worker.can_prefill
    worker.report(worker_pb2.StatsResponse(role=BOTH))
    assert worker.can_decode and worker.can_prefill and worker.load(0).role == BOTH


def test_who_is_silent_for_longer_than_three_reports_is_suspect() -> None:
    clock = Clock()
    worker = ledger(clock)
    clock.now += 1.9
    assert not worker.suspect
    clock.now += 0.2
    assert worker.suspect
    worker.report(stats())
    assert not worker.suspect
