"""Which chunks make a transfer complete: the pure rules of both sides, under every order of events."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Incompatible, PagewireError, Unavailable
from pagewire_transfer.chunking import ChunkPlan
from pagewire_transfer.incoming import Incoming
from pagewire_transfer.wire import ChunkRange, chunk_bytes, root_checksum, token_bytes

LAYOUT = kv.KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, dtype="float32")


def chunk_of(part: ChunkRange, seq: int, layout: kv.KvLayout = LAYOUT) -> kv.Chunk:
    return kv.Chunk(
        seq=seq,
        layer_begin=part.layers[0],
        layer_end=part.layers[1],
        token_begin=part.tokens[0],
        token_end=part.tokens[1],
        num_bytes=max(0, chunk_bytes(layout, part)),
        checksum=1000 + seq,
    )


def cells(part: ChunkRange) -> set[tuple[int, int]]:
    return {(layer, token) for layer in range(*part.layers) for token in range(*part.tokens)}


@given(
    layers=st.integers(1, 6),
    begin=st.integers(0, 5),
    tokens=st.integers(0, 30),
    limit=st.integers(1, 3000),
    least=st.integers(0, 200),
    steps=st.lists(st.tuples(st.integers(0, 35), st.integers(0, 35), st.integers(0, 6)), max_size=8),
    takes=st.integers(0, 4),
)
def test_a_plan_covers_every_cell_once_within_the_limit(
    layers: int, begin: int, tokens: int, limit: int, least: int, steps: list[tuple[int, int, int]], takes: int
) -> None:
    """Steps end one after the other; some tell of their first layers before they do."""
    layout = kv.KvLayout(num_layers=layers, num_kv_heads=1, head_dim=3, dtype="bfloat16")
    end = begin + tokens
    plan = ChunkPlan(layout, (begin, end), limit, least)
    seen: set[tuple[int, int]] = set()
    ready = {(layer, token) for layer in range(layers) for token in range(begin)}

    def take() -> None:
        part = plan.take()
        new = cells(part)
        assert new and not new & seen
        assert chunk_bytes(layout, part) <= max(limit, token_bytes(layout))
        assert new <= ready, "KV was sent before it was final"
        seen.update(new)

    final = 0
    for length, told, told_layers in [*steps, (0, 0, 0), (end, 0, 0)]:
        step_end = min(final + length, end)
        for layer in range(1, min(told_layers, layers)):  # while the step runs
            ready |= {(known, token) for known in range(layer) for token in range(step_end)}
            plan.extend(final, (step_end, layer))
            for _ in range(told):
                if plan.has_next:
                    take()
        final = step_end
        ready |= {(layer, token) for layer in range(layers) for token in range(final)}
        plan.extend(final)
        for _ in range(takes):
            if plan.has_next:
                take()
    while plan.has_next:
        take()
    assert plan.done
    assert seen == cells(ChunkRange((0, layers), (begin, end)))


def taken(plan: ChunkPlan) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(layers, tokens) of the chunks that can be taken now."""
    parts = []
    while plan.has_next:
        part = plan.take()
        parts.append((part.layers, part.tokens))
    return parts


TOKEN = token_bytes(LAYOUT)


@pytest.mark.parametrize(
    ("limit", "chunks"),
    [
        (1000 * TOKEN, [((0, 3), (100, 110))]),
        (29 * TOKEN, [((0, 2), (100, 110)), ((2, 3), (100, 110))]),
        (10 * TOKEN, [((layer, layer + 1), (100, 110)) for layer in range(3)]),
        (9 * TOKEN, [((layer, layer + 1), part) for layer in range(3) for part in ((100, 105), (105, 110))]),
        (4 * TOKEN, [((n, n + 1), part) for n in range(3) for part in ((100, 104), (104, 108), (108, 110))]),
    ],
)
def test_chunks_are_as_many_whole_layers_as_fit_or_equal_parts_of_one(
    limit: int, chunks: list[tuple[tuple[int, int], tuple[int, int]]]
) -> None:
    """Wherever in the prompt they lie: it is what they span that counts."""
    plan = ChunkPlan(LAYOUT, (100, 110), limit)
    plan.extend(110)
    assert taken(plan) == chunks and plan.done


def test_layers_go_ahead_of_their_step_once_they_are_worth_a_chunk() -> None:
    """Each chunk costs its time; what is final goes in any case."""
    plan = ChunkPlan(LAYOUT, (100, 110), 1000 * TOKEN, least_bytes=16 * TOKEN)
    plan.extend(100, (108, 1))
    assert not plan.has_next
    plan.extend(100, (108, 2))  # sixteen tokens' worth of a layer
    assert taken(plan) == [((0, 2), (100, 108))]
    plan.extend(100, (108, 1))  # going back is ignored
    assert not plan.has_next
    plan.extend(108)
    assert taken(plan) == [((2, 3), (100, 108))]
    plan.extend(110)
    assert taken(plan) == [((0, 3), (108, 110))]


def test_layers_that_fill_a_chunk_do_not_wait_for_more() -> None:
    plan = ChunkPlan(LAYOUT, (0, 8), 8 * TOKEN, least_bytes=100 * TOKEN)
    plan.extend(0, (8, 1))
    assert taken(plan) == [((0, 1), (0, 8))]


Part = st.builds(
    lambda l0, l1, t0, t1: ChunkRange((l0, l1), (t0, t1)),
    st.integers(0, 4), st.integers(0, 4), st.integers(0, 7), st.integers(0, 7),
)  # fmt: skip
Event = st.one_of(
    st.tuples(st.just("announce"), Part, st.integers(0, 2)),
    st.tuples(st.sampled_from(["verified", "damaged"]), st.integers(0, 8), st.none()),
    st.tuples(st.just("seal"), st.integers(0, 9), st.booleans()),
)


@given(st.lists(Event, max_size=25))
def test_no_order_of_events_seals_what_is_not_there_exactly_once(events: list[tuple[str, object, object]]) -> None:
    """An independent model: a set of verified cells. Sealed implies it is the offer, cell for cell."""
    offer = ChunkRange((0, 3), (1, 6))
    incoming = Incoming(LAYOUT, offer.tokens, window=3)
    announced: dict[int, ChunkRange] = {}  # on the lane now
    refused: dict[int, ChunkRange] = {}
    verified: list[tuple[int, int]] = []
    try:
        for kind, what, extra in events:
            if kind == "announce":
                assert isinstance(what, ChunkRange) and isinstance(extra, int)
                seq = next(iter(refused), incoming.chunks) if extra else incoming.chunks
                part = refused.get(seq, what)
                incoming.announce(chunk_of(part, seq))
                refused.pop(seq, None)
                announced[seq] = part
                assert cells(part) <= cells(offer)
            elif kind == "verified" and what in announced:
                verified.extend(cells(announced.pop(what)))
                incoming.verified(what)
            elif kind == "damaged" and what in announced:
                incoming.damaged(what)
                refused[what] = announced.pop(what)
            elif kind == "seal":
                sums = [1000 + seq for seq in range(incoming.chunks)]
                incoming.seal(incoming.chunks if extra else what, root_checksum(sums))
                assert sorted(verified) == sorted(cells(offer))
                return
    except PagewireError:
        return  # failed closed


def test_a_chunk_that_is_sent_again_has_the_size_it_had() -> None:
    """More bytes than there is room for would come over the lane, or fewer, and the next chunk's be taken for its."""
    chunk = chunk_of(ChunkRange((0, 3), (1, 6)), 0)
    for change in (-1, 1):
        incoming = Incoming(LAYOUT, (1, 6), window=3)
        incoming.announce(chunk)
        incoming.damaged(0)
        again = kv.Chunk()
        again.CopyFrom(chunk)
        again.num_bytes += change
        with pytest.raises(Incompatible, match="another range or size"):
            incoming.announce(again)


def partition(data: st.DataObject, offer: ChunkRange) -> list[ChunkRange]:
    """The offer cut into chunks along random lines, in random order."""
    layer_cuts = sorted({0, 3, *data.draw(st.sets(st.integers(1, 2)))})
    token_cuts = sorted({*offer.tokens, *data.draw(st.sets(st.integers(offer.tokens[0] + 1, offer.tokens[1] - 1)))})
    parts = [ChunkRange(layers, tokens) for layers in pairwise(layer_cuts) for tokens in pairwise(token_cuts)]
    return data.draw(st.permutations(parts))


def deliver(data: st.DataObject, incoming: Incoming, parts: list[ChunkRange], window: int) -> list[int]:
    """Announces, verifies and damages (once) the chunks in a random order; returns their checksums."""
    on_the_lane: list[kv.Chunk] = []
    sums: list[int] = []
    damaged: set[int] = set()
    while parts or on_the_lane:
        may_announce = parts and len(on_the_lane) < window
        if may_announce and (not on_the_lane or data.draw(st.booleans())):
            on_the_lane.append(chunk_of(parts.pop(), len(sums)))
            sums.append(on_the_lane[-1].checksum)
            incoming.announce(on_the_lane[-1])
            continue
        chunk = on_the_lane.pop(data.draw(st.integers(0, len(on_the_lane) - 1)))
        if chunk.seq not in damaged and data.draw(st.booleans()):
            damaged.add(chunk.seq)
            incoming.damaged(chunk.seq)
            incoming.announce(chunk)
            on_the_lane.append(chunk)
        else:
            incoming.verified(chunk.seq)
    return sums


@given(st.data(), st.integers(1, 4), st.sampled_from(["none", "missing", "twice", "count", "root"]))
def test_a_transfer_is_sealed_in_every_order_and_only_without_a_fault(
    data: st.DataObject, window: int, fault: str
) -> None:
    offer = ChunkRange((0, 3), (1, 6))
    parts = partition(data, offer)
    if fault == "missing":
        parts.pop()
    if fault == "twice":
        parts.append(data.draw(st.sampled_from(parts)))
    incoming = Incoming(LAYOUT, offer.tokens, window)
    with contextlib.nullcontext() if fault == "none" else pytest.raises(Incompatible):
        sums = deliver(data, incoming, parts, window)
        incoming.seal(len(sums) + (fault == "count"), root_checksum(sums) ^ (fault == "root"))
    if fault == "none":
        assert incoming.bytes == len(cells(offer)) * token_bytes(LAYOUT)


def test_a_chunk_may_be_damaged_once_only() -> None:
    incoming = Incoming(LAYOUT, (0, 2), window=2)
    chunk = chunk_of(ChunkRange((0, 3), (0, 2)), 0)
    incoming.announce(chunk)
    incoming.damaged(0)
    incoming.announce(chunk)
    with pytest.raises(Unavailable, match="twice"):
        incoming.damaged(0)


def test_a_chunk_does_not_come_again_unasked_nor_as_another() -> None:
    incoming = Incoming(LAYOUT, (0, 2), window=2)
    incoming.announce(chunk_of(ChunkRange((0, 3), (0, 1)), 0))
    with pytest.raises(Incompatible, match="unasked"):
        incoming.announce(chunk_of(ChunkRange((0, 3), (0, 1)), 0))
    incoming.damaged(0)
    with pytest.raises(Incompatible, match="another range"):
        incoming.announce(chunk_of(ChunkRange((0, 3), (1, 2)), 0))


def test_more_chunks_than_the_window_are_refused() -> None:
    incoming = Incoming(LAYOUT, (0, 2), window=1)
    incoming.announce(chunk_of(ChunkRange((0, 3), (0, 1)), 0))
    with pytest.raises(Incompatible, match="window of 1"):
        incoming.announce(chunk_of(ChunkRange((0, 3), (1, 2)), 1))


@pytest.mark.parametrize("refused", [False, True])
def test_a_seal_does_not_overtake_a_chunk(refused: bool) -> None:
    """Announced is not arrived: the ranges are all claimed, but the last bytes are not verified."""
    incoming = Incoming(LAYOUT, (0, 1), window=2)
    incoming.announce(chunk_of(ChunkRange((0, 3), (0, 1)), 0))
    if refused:
        incoming.damaged(0)
    with pytest.raises(Incompatible, match="1 chunks were unacknowledged"):
        incoming.seal(1, root_checksum([1000]))


def incoming_of(tokens: tuple[int, int]) -> Incoming:
    return Incoming(LAYOUT, tokens, window=3)


def arrive(incoming: Incoming, tokens: tuple[int, int], seq: int) -> None:
    incoming.announce(chunk_of(ChunkRange((0, 3), tokens), seq))
    incoming.verified(seq)


def test_a_chunk_that_came_twice_does_not_stand_for_one_that_did_not_come() -> None:
    """As many cells as were offered, and a hole among them."""
    incoming = incoming_of((0, 8))
    arrive(incoming, (0, 4), 0)
    with pytest.raises(Incompatible, match="overlaps"):
        arrive(incoming, (0, 4), 1)
    with pytest.raises(Incompatible, match="overlaps"):
        arrive(incoming, (3, 7), 1)


def test_a_chunk_has_as_many_bytes_as_its_range() -> None:
    chunk = chunk_of(ChunkRange((0, 3), (0, 4)), 0)
    chunk.num_bytes -= 1
    with pytest.raises(Incompatible, match="bytes, not"):
        incoming_of((0, 8)).announce(chunk)


def test_a_chunk_comes_again_once_for_each_time_it_is_asked_for_and_is_sealed_as_it_then_is() -> None:
    incoming = incoming_of((0, 4))
    chunk = chunk_of(ChunkRange((0, 3), (0, 4)), 0)
    incoming.announce(chunk)
    incoming.damaged(0)
    chunk.checksum += 1
    incoming.announce(chunk)
    with pytest.raises(Incompatible, match="unasked"):
        incoming.announce(chunk)
    incoming.verified(0)
    with pytest.raises(Incompatible, match="root checksum"):
        incoming.seal(1, root_checksum([chunk.checksum - 1]))
    incoming.seal(1, root_checksum([chunk.checksum]))
