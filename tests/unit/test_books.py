"""What the books of an engine say between a launch and its landing, and of those that wait."""

from __future__ import annotations

from engines import ROOT, Run
from pagewire_core.block_hash import PageKeys
from pagewire_engine.announced_blocks import AnnouncedBlocks
from pagewire_engine.block_manager import BlockManager
from pagewire_engine.books import Books
from pagewire_engine.config import EngineConfig
from pagewire_engine.scheduler import Admission, Decision
from pagewire_engine.sequence import Sequence

CONFIG = EngineConfig(256, 16, 32, 8, 400)


def books_of(stored: list[bytes] | None = None) -> Books:
    blocks = BlockManager(CONFIG.num_blocks)
    return Books(CONFIG, blocks, AnnouncedBlocks((stored if stored is not None else []).extend, lambda gone: None))


def waiting(books: Books, prompt: list[int]) -> Sequence:
    seq = Sequence(Run(prompt).request, 0, list(prompt), len(prompt), PageKeys(ROOT, 16))
    books.enqueue(seq)
    return seq


def computed(books: Books, prompt: list[int]) -> Sequence:
    """One whose prompt a launched step computes."""
    seq = waiting(books, prompt)
    books.bind(Decision(admitted=(Admission(seq, books.lookup(seq), len(prompt)),)))
    seq.num_computed = seq.num_scheduled = len(prompt)
    return seq


def test_a_block_that_gives_way_to_an_equal_one_is_kept_for_the_step_that_reads_it() -> None:
    books = books_of()
    first, second = computed(books, [1] * 20), computed(books, [1] * 20)
    own = second.block_table[0]
    books.launched = 1
    books.register(first)
    books.register(second)
    assert second.block_table[0] == first.block_table[0] != own
    assert list(books.seats.tables[second.seat, :2]) == second.block_table
    assert [books.blocks.ref_count(block) for block in (own, first.block_table[0])] == [1, 2]
    books.land(1)
    assert [books.blocks.ref_count(block) for block in (own, first.block_table[0])] == [0, 2]


def test_whole_hash_blocks_are_announced_once_each_however_a_prompt_was_cut() -> None:
    stored: list[bytes] = []
    books = books_of(stored)
    seq = computed(books, list(range(200)))
    for seq.num_computed in (10, 40, 64, 100, 130, 130, 200):
        books.register(seq)
    assert stored == PageKeys(ROOT, 16).extend(seq.tokens, 200)[3::4]


def test_of_a_prompt_that_waits_only_what_is_not_cached_counts_as_work() -> None:
    books = books_of()
    books.register(computed(books, [1] * 40))
    computing = books.prefill_work
    seq = waiting(books, [1] * 50)
    tokens, attended = (now - before for now, before in zip(books.prefill_work, computing, strict=True))
    assert (tokens, attended) == (50 - 32, (50 - 32) * (50 + 32) / 2)
    books.drop(seq)
    assert books.prefill_work == computing


def test_a_first_token_whose_id_is_zero_is_computed_where_any_other_is() -> None:
    books = books_of()
    for token in (0, 7):
        seq = computed(books, [1] * 20)
        seq.tokens.append(token)
        books.decode(seq, token)
        assert (books.rows.positions[seq.row], books.rows.next_ids[seq.row]) == (20, token)


def test_whose_first_token_comes_now_is_the_last_to_have_come() -> None:
    books = books_of()
    long, other = computed(books, [1] * 20), computed(books, [2] * 20)
    books.move_to_end(long)
    assert list(books.running) == [other, long]
