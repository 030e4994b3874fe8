"""The benchmark of the engine's own work runs, and a prompt that waits costs the others next to nothing."""

from __future__ import annotations

import bookkeeping


def test_every_figure_is_a_time() -> None:
    figures = (
        bookkeeping.decode_step(3, 1), bookkeeping.join_and_leave(1, 3), bookkeeping.prefix_lookup(1024, 1),
        bookkeeping.allocate_and_release(8, 1), bookkeeping.allocate_evicting(8, 1),
    )  # fmt: skip
    assert all(0 < microseconds < 1e5 for microseconds in figures)


def test_a_long_prompt_that_finds_no_room_is_not_looked_up_in_every_step() -> None:
    """100 000 tokens: one lookup takes about a millisecond, and was made in each step."""
    assert bookkeeping.held_up(3) < 300
