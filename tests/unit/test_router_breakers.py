"""Circuit breakers, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pagewire_router.breakers import Breaker, Breakers


class Scene:
    def __init__(self) -> None:
        self.now = 1000.0
        self.opened: list[str] = []
        self.breakers = Breakers(lambda: self.now, lambda b: self.opened.append(b.leg))

    def fail(self, leg: str, *workers: str, cause: str = "unavailable", times: int = 1) -> None:
        for _ in range(times):
            self.breakers.failed(leg, cause, *workers)  # type: ignore[arg-type]


def test_a_leg_that_fails_three_times_in_a_row_rests_and_the_other_legs_go_on() -> None:
    """A router of the field records both legs' outcome for both workers: a dead decode worker opened prefill's."""
    s = Scene()
    s.fail("prefill", "a", times=2)
    s.breakers.succeeded("prefill", "a")
    s.fail("prefill", "a", times=2)
    assert s.breakers.allows("prefill", "a")
    s.fail("prefill", "a")
    assert not s.breakers.allows("prefill", "a")
    assert s.breakers.allows("decode", "a") and s.breakers.allows("prefill", "b")
    assert s.breakers.allows("transfer", "a", "d")
    assert s.opened == ["prefill"]


def test_failures_of_different_kinds_do_not_add_up() -> None:
    s = Scene()
    for cause in ("unavailable", "internal", "deadline"):
        s.fail("decode", "d", cause=cause, times=2)
    assert s.breakers.allows("decode", "d")


def test_one_lost_transfer_rests_that_pair_alone() -> None:
    s = Scene()
    s.fail("transfer", "p", "d")
    assert not s.breakers.allows("transfer", "p", "d")
    assert s.breakers.allows("transfer", "p", "e") and s.breakers.allows("transfer", "q", "d")
    assert s.breakers.allows("prefill", "p") and s.breakers.allows("decode", "d")


def test_half_open_lets_one_attempt_through_and_waits_twice_as_long_after_a_failure() -> None:
    s = Scene()
    s.fail("decode", "d", times=3)
    for backoff in (2, 4, 8, 16, 32, 60, 60):
        s.now += backoff - 0.01
        assert not s.breakers.allows("decode", "d")
        s.now += 0.01
        assert s.breakers.allows("decode", "d")
        s.breakers.attempt("decode", "d")
        assert not s.breakers.allows("decode", "d"), "the probe is the only one"
        s.fail("decode", "d")
    s.now += 60
    s.breakers.attempt("decode", "d")
    s.breakers.succeeded("decode", "d")
    assert s.breakers.allows("decode", "d") and not list(s.breakers)


def test_a_probe_that_is_never_judged_does_not_block_for_ever() -> None:
    s = Scene()
    s.fail("decode", "d", times=3)
    s.now += 2
    s.breakers.attempt("decode", "d")  # and its client goes away
    s.now += 2
    assert s.breakers.allows("decode", "d")


def test_attempts_that_were_under_way_do_not_prolong_the_rest() -> None:
    s = Scene()
    s.fail("decode", "d", times=30)
    assert [round(seconds, 6) for _, _, seconds in s.breakers] == [2.0]
    assert len(s.opened) == 1


def test_a_worker_that_comes_back_begins_anew() -> None:
    s = Scene()
    s.fail("transfer", "p", "d")
    s.fail("decode", "d", times=3)
    s.fail("decode", "e", times=3)
    s.breakers.forget("d")
    assert s.breakers.allows("transfer", "p", "d") and s.breakers.allows("decode", "d")
    assert not s.breakers.allows("decode", "e")


STEPS = st.lists(st.tuples(st.sampled_from(["fail", "succeed", "attempt", "wait"]), st.floats(0.0, 100.0)), max_size=60)


@given(leg=st.sampled_from(["prefill", "transfer", "decode"]), steps=STEPS)
def test_whatever_happens_it_blocks_for_a_bounded_time_and_only_after_failures(
    leg: str, steps: list[tuple[str, float]]
) -> None:
    s, in_a_row = Scene(), 0
    longest = 480.0 if leg == "transfer" else 60.0
    for what, seconds in steps:
        if what == "fail":
            in_a_row += 1
            s.fail(leg, "w")
        elif what == "succeed":
            in_a_row = 0
            s.breakers.succeeded(leg, "w")  # type: ignore[arg-type]
        elif what == "attempt":
            s.breakers.attempt(leg, "w")  # type: ignore[arg-type]
        else:
            s.now += seconds
        if not s.breakers.allows(leg, "w"):  # type: ignore[arg-type]
            assert in_a_row >= (1 if leg == "transfer" else 3)
        waits = [left for _, state, left in s.breakers if state == "open"]
        assert all(0 < left <= longest for left in waits)
        assert bool(waits) != s.breakers.allows(leg, "w")  # type: ignore[arg-type]


@given(times=st.lists(st.floats(0, 1000), min_size=1, max_size=30))
def test_a_back_off_only_grows_while_it_is_not_closed(times: list[float]) -> None:
    breaker, now, last = Breaker("decode", ("d",), "internal"), 0.0, 0.0
    for wait in times:
        now += wait
        breaker.attempt(now)
        breaker.fail(now)
        assert breaker.backoff_s >= last and breaker.until <= now + 60
        last = breaker.backoff_s
