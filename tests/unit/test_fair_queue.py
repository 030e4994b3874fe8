from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_router.fair_queue import AGEING, QUANTUM, FairQueue, Waiting

TENANTS = ("a", "b", "c")
LONGEST = 20 * QUANTUM


def take(queue: FairQueue) -> Waiting:
    waiting = queue.next()
    assert waiting is not None and queue.next() is waiting
    queue.take(waiting)
    return waiting


def fill(queue: FairQueue, tenant: str, count: int, tokens: int = 100, priority: int = 0) -> list[Waiting]:
    made = [Waiting(tokens, tenant, priority) for _ in range(count)]
    for waiting in made:
        queue.put(waiting)
    return made


class Model:
    """What a queue must hold, kept the plain way."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.waiting: list[Waiting] = []

    def put(self, waiting: Waiting) -> None:
        self.queue.put(waiting)
        self.waiting.append(waiting)
        self.check()

    def take(self) -> Waiting | None:
        if not self.waiting:
            assert self.queue.next() is None
            return None
        waiting = take(self.queue)
        self.waiting.remove(waiting)
        first = [w for w in self.waiting if (w.tenant, w.priority) == (waiting.tenant, waiting.priority)]
        assert all(w.arrival > waiting.arrival for w in first), "of one tenant, who came first goes first"
        self.check()
        return waiting

    def drop(self, waiting: Waiting) -> None:
        self.queue.remove(waiting)
        self.waiting.remove(waiting)
        self.check()

    def check(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.tokens == sum(w.tokens for w in self.waiting)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(TENANTS), st.integers(0, LONGEST), st.sampled_from([-5, 0, 7])),
        st.tuples(st.just("take")),
        st.tuples(st.just("drop"), st.integers(0, 100)),
        st.tuples(st.just("shed")),
        st.tuples(st.just("charge"), st.sampled_from(TENANTS), st.integers(0, LONGEST), st.sampled_from([-5, 0, 7])),
    ),
    max_size=60,
)


@given(STEPS)
def test_nobody_is_lost_whatever_happens(steps: list[tuple[object, ...]]) -> None:
    model = Model()
    for what, *args in steps:
        if what == "put":
            model.put(Waiting(args[1], args[0], args[2]))  # type: ignore[arg-type]
        elif what == "take":
            model.take()
        elif what == "charge":
            model.queue.charge(Waiting(0, args[0], args[2]), args[1])  # type: ignore[arg-type]
        elif model.waiting:
            model.drop(model.queue.shed() if what == "shed" else model.waiting[args[0] % len(model.waiting)])
    while model.waiting:
        model.take()
    assert model.queue.next() is None


@settings(max_examples=40)
@given(st.integers(0, 1 << 30), st.sampled_from([2, 3, 10]), st.booleans())
def test_tenants_that_wait_get_equal_tokens(seed: int, num_tenants: int, generate: bool) -> None:
    """Whoever goes was ahead of nobody by more than the bound, prompts and generated tokens taken together."""
    rng = random.Random(seed)
    queue, service = FairQueue(), defaultdict(int)
    tenants = [f"t{i}" for i in range(num_tenants)]
    # Each has its own kind of request: many small ones must not be worth more than few long ones.
    shortest = {t: rng.choice((1, 500, LONGEST // 2)) for t in tenants}
    tiny = tenants[0] if rng.random() < 0.5 else None

    def size(tenant: str) -> int:
        return 1 if tenant == tiny else rng.randint(shortest[tenant], LONGEST)

    for tenant in tenants:
        for _ in range(3):
            queue.put(Waiting(size(tenant), tenant))
    running: list[Waiting] = []
    for _ in range(150):
        waiting = queue.next()
        assert waiting is not None
        least = min(service[t] for t in tenants)
        assert service[waiting.tenant] - least <= 2 * (QUANTUM + LONGEST)
        queue.take(waiting)
        service[waiting.tenant] += waiting.tokens
        queue.put(Waiting(size(waiting.tenant), waiting.tenant))
        running.append(waiting)
        if generate and rng.random() < 0.7:
            lucky, tokens = rng.choice(running), rng.randint(1, 300)
            queue.charge(lucky, tokens)
            service[lucky.tenant] += tokens


def test_who_owes_waits_until_the_others_have_had_as_much() -> None:
    queue = FairQueue()
    greedy, modest = fill(queue, "greedy", 5), fill(queue, "modest", 100)
    queue.charge(greedy[0], 4000)
    served = [take(queue).tenant for _ in range(30)]
    assert "greedy" not in served
    assert "greedy" in [take(queue).tenant for _ in range(30)]
    assert modest


def test_nobody_owes_for_what_nobody_else_wanted() -> None:
    """A tenant that was alone for an hour would have stood behind a newcomer for the next one."""
    queue = FairQueue()
    first = fill(queue, "alone", 40)
    queue.charge(first[0], 10_000_000)
    take(queue)
    fill(queue, "new", 40)
    assert [take(queue).tenant for _ in range(50)].count("alone") >= 20


def test_who_owes_and_does_not_wait_gets_no_more_of_the_rounds_that_others_need_than_pays_it_off() -> None:
    queue = FairQueue()
    fill(queue, "longest", 1, tokens=1000 * QUANTUM)
    [long], [owing] = fill(queue, "long", 1, tokens=500 * QUANTUM), fill(queue, "owing", 1)
    queue.charge(owing, 100 * QUANTUM)
    queue.remove(owing)
    assert take(queue) is long
    fill(queue, "long", 20), fill(queue, "owing", 20)
    assert 5 < [take(queue).tenant for _ in range(20)].count("long") < 15


def test_who_asks_for_one_thing_at_a_time_owes_all_the_same() -> None:
    """What it gets is made while nothing of its waits: it would never have paid."""
    queue = FairQueue()
    fill(queue, "patient", 40)
    one = fill(queue, "one at a time", 1)
    served = []
    for _ in range(30):
        served.append(take(queue))
        if served[-1].tenant == "one at a time":
            queue.charge(served[-1], 1000)
            take(queue)
            one = fill(queue, "one at a time", 1)
    assert one and [waiting.tenant for waiting in served].count("one at a time") <= 4


def test_what_is_left_of_a_turn_is_not_saved_up() -> None:
    """Nor is a tenant kept that owes nothing: names are the clients'."""
    queue = FairQueue()
    fill(queue, "busy", 3)
    for i in range(100):
        fill(queue, f"once-{i}", 1, tokens=0), fill(queue, "saving", 1, tokens=1), fill(queue, "busy", 3)
        while queue.tokens > 300:
            take(queue)
    fill(queue, "saving", 20), fill(queue, "busy", 20)
    assert [take(queue).tenant for _ in range(20)].count("saving") < 15


def test_what_was_owed_is_forgotten_when_nobody_waits() -> None:
    queue = FairQueue()
    [owing], [other] = fill(queue, "owing", 1), fill(queue, "other", 1)
    queue.charge(owing, 1_000_000)
    queue.remove(owing), queue.remove(other)
    fill(queue, "owing", 20), fill(queue, "other", 20)
    assert [take(queue).tenant for _ in range(40)][:21].count("owing") > 0


def test_a_request_far_beyond_a_turn_goes_at_once_where_nobody_else_waits() -> None:
    queue = FairQueue()
    [huge] = fill(queue, "a", 1, tokens=1000 * QUANTUM)
    assert take(queue) is huge


def test_lower_numbers_go_first() -> None:
    queue = FairQueue()
    last, first, middle = (fill(queue, "a", 2, priority=p) for p in (3, -1, 0))
    assert [take(queue) for _ in range(6)] == [*first, *middle, *last]


def test_a_flood_of_important_requests_starves_nobody() -> None:
    queue = FairQueue()
    [patient] = fill(queue, "a", 1, priority=5)
    taken = []
    for _ in range(AGEING):
        fill(queue, "a", 3, priority=0)
        taken.append(take(queue))
    assert taken.index(patient) == AGEING - 1


def test_a_full_queue_does_without_the_newest_of_who_has_most_in_the_last_band() -> None:
    queue = FairQueue()
    fill(queue, "a", 3, priority=-1)
    few, many = fill(queue, "few", 1), fill(queue, "many", 3)
    assert queue.shed() is many[-1]
    late = fill(queue, "few", 1, priority=1)
    assert queue.shed() is late[0]
    assert few


@pytest.mark.parametrize(
    ("tenant", "priority", "expected"), [("b", 0, 700), ("new", 0, 2 * QUANTUM), ("a", -1, 0), ("a", 1, 700)]
)
def test_what_goes_before_a_newcomer(tenant: str, priority: int, expected: int) -> None:
    queue = FairQueue()
    fill(queue, "a", 3), fill(queue, "b", 4)
    assert queue.ahead_of(Waiting(1, tenant, priority)) == expected


def test_a_small_tenant_waits_less_than_the_whole_queue() -> None:
    queue = FairQueue()
    fill(queue, "a", 1000), fill(queue, "b", 1)
    assert queue.ahead_of(Waiting(1, "b")) == 200
    assert queue.ahead_of(Waiting(1, "new")) == 2 * QUANTUM
