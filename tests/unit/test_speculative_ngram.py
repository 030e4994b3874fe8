"""The incremental index against a search of the whole sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pagewire_engine.speculative.ngram import NgramIndex


def _naive(tokens: list[int], smallest: int, largest: int, count: int) -> list[int]:
    """Longest suffix first, latest occurrence first; what followed, and on as a repetition."""
    for length in range(largest, smallest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                copied = list(tokens)
                for _ in range(count):
                    copied.append(copied[end])
                    end += 1
                return copied[len(tokens) :]
    return []


@given(
    st.lists(st.integers(0, 2), max_size=14),  # few enough for at most 16 candidates
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 6),
)
def test_the_index_finds_what_a_search_finds_at_every_length(
    tokens: list[int], smallest: int, more: int, count: int
) -> None:
    index = NgramIndex(smallest, smallest + more)
    for length in range(len(tokens) + 1):
        index.extend(tokens[:length], 100)
        assert index.lookup(tokens[:length], count) == _naive(tokens[:length], smallest, smallest + more, count)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 5)))
def test_cut_into_any_pieces_the_index_is_the_same(tokens: list[int], pieces: list[int]) -> None:
    whole, cut = NgramIndex(2, 4), NgramIndex(2, 4)
    whole.extend(tokens, 100)
    for piece in pieces:
        cut.extend(tokens, piece)
    while cut.extend(tokens, 3):
        pass
    assert cut.lookup(tokens, 5) == whole.lookup(tokens, 5)


def test_an_index_that_is_behind_proposes_nothing() -> None:
    """A long prompt is indexed over several steps; half of an index would know only old matches."""
    tokens = [1, 2, 3] * 10
    index = NgramIndex(2, 2)
    assert index.extend(tokens, 5) == 5
    assert index.lookup(tokens, 3) == []
    index.extend(tokens, 100)
    assert index.lookup(tokens, 3) == [1, 2, 3]


def test_nothing_is_indexed_twice() -> None:
    index = NgramIndex(2, 2)
    tokens = list(range(100))
    assert index.extend(tokens, 1000) == 98
    assert index.extend([*tokens, 1], 1000) == 1


def test_the_latest_of_equally_long_matches_wins_and_a_longer_one_before_it_too() -> None:
    assert _lookup([7, 8, 1, 0, 7, 8, 2, 0, 7, 8], 2, 2) == [2]
    assert _lookup([9, 7, 8, 1, 0, 7, 8, 2, 9, 7, 8], 2, 3) == [1]


def _lookup(tokens: list[int], smallest: int, largest: int) -> list[int]:
    index = NgramIndex(smallest, largest)
    index.extend(tokens, 100)
    return index.lookup(tokens, 1)
