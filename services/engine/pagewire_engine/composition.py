"""A decision whose blocks are bound -> the batch of the step, and the books as they are once it is launched."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

import numpy as np

from pagewire_engine.batch import Batch, Scored
from pagewire_engine.books import Books
from pagewire_engine.continued import Continued
from pagewire_engine.sampler import SampleRow
from pagewire_engine.scheduler import Decision
from pagewire_engine.sequence import Sequence

_T = TypeVar("_T")


def compose(books: Books, decision: Decision, copies: Seq[tuple[int, int]]) -> Batch | None:
    """The next step's batch; None if there is nothing to compute. Books the step as launched."""
    chunks = [(seq, 1 + len(seq.draft)) for seq in decision.drafted]
    chunks += decision.chunks
    chunks += [(admission.seq, admission.chunk) for admission in decision.admitted]
    if not len(decision.decode) and not chunks:
        return None
    batch = _build(books, decision.decode, chunks, len(decision.drafted), copies)
    _book(books, decision.decode, chunks, len(decision.drafted))
    return batch


def _build(
    books: Books, decode: np.ndarray, chunks: Seq[tuple[Sequence, int]], num_drafted: int, copies: Seq[tuple[int, int]]
) -> Batch:
    rows, n = books.rows, len(decode)
    parts = [_draft_part(seq) for seq, _ in chunks[:num_drafted]]
    parts += [_chunk_part(seq, count) for seq, count in chunks[num_drafted:]]
    starts = np.cumsum([n, *(count for _, count in chunks)])
    sample_rows = [row for part in parts for row in part.sample_rows]
    sample_from = [start + row for start, part in zip(starts.tolist(), parts, strict=False) for row in part.sample_from]
    positions = rows.positions[decode]
    return Batch(
        scheduled=_at(rows.scheduled, decode) + tuple(chunks),
        input_ids=_int32(rows.next_ids[decode], *(part.input_ids for part in parts)),
        positions=_int32(positions, *(np.arange(part.begin, part.begin + len(part.input_ids)) for part in parts)),
        query_start=_int32(np.arange(n), starts),
        seq_lens=_int32(positions + 1, [part.begin + len(part.input_ids) for part in parts]),
        num_decode=n,
        tables=books.seats.tables,
        seats=_int32(rows.seats[decode], [seq.seat for seq, _ in chunks]),
        table_changes=books.seats.changes(),
        sample_from=_int32(np.arange(n), sample_from),
        sample_rows=_at(rows.sample_rows, decode) + tuple(sample_rows),
        copies=tuple(copies),
        scored=_scored(chunks[num_drafted:], starts[num_drafted:]) if len(chunks) > num_drafted else None,
    )


@dataclass(frozen=True)
class _Part:
    """What one sequence adds to the batch besides the decode rows; sample_from counts from its first row."""

    begin: int
    input_ids: list[int]
    sample_from: Seq[int]
    sample_rows: Seq[SampleRow]


def _draft_part(seq: Sequence) -> _Part:
    """A token after the last one and one after each draft token, each as if the drafts before it were true."""
    views = [Continued(seq.tokens, seq.draft[:i]) for i in range(len(seq.draft) + 1)]
    sample_rows = [seq.request.sample_row(seq.choice, view) for view in views]
    return _Part(seq.num_computed, [seq.tokens[-1], *seq.draft], range(len(views)), sample_rows)


def _chunk_part(seq: Sequence, count: int) -> _Part:
    """Known tokens; the first tokens after them if they are the last ones."""
    begin, end = seq.num_scheduled, seq.num_scheduled + count
    choices = seq.request.choices_to_sample(seq) if end == len(seq.tokens) else ()
    sample_rows = [seq.request.sample_row(choice, seq.tokens) for choice in choices]
    return _Part(begin, seq.tokens[begin:end], [count - 1] * len(sample_rows), sample_rows)


def _scored(chunks: Seq[tuple[Sequence, int]], starts: np.ndarray) -> Scored | None:
    """The rows of prompts that tell how likely the tokens after them were; starts: the first row of each chunk."""
    if all(seq.request.prompt_logprobs is None for seq, _ in chunks):
        return None
    parts, rows, num_top = [], [], 0
    for (seq, count), start in zip(chunks, starts.tolist(), strict=False):
        begin = seq.num_scheduled
        if tokens := seq.request.to_score(begin, begin + count):
            parts.append((seq, tokens.start, len(tokens)))
            rows += [start + token - 1 - begin for token in tokens]
            num_top = max(num_top, seq.request.prompt_logprobs or 0)
    ids = [token for seq, first, count in parts for token in seq.tokens[first : first + count]]
    return Scored(np.array(rows, np.int32), np.array(ids, np.int32), num_top, tuple(parts)) if parts else None


def _book(books: Books, decode: np.ndarray, chunks: Seq[tuple[Sequence, int]], num_drafted: int) -> None:
    books.launched += 1
    books.rows.advance(decode, books.launched)
    for seq, _ in chunks[:num_drafted]:
        books.rows.last_steps[seq.row] = books.launched
        books.rows.may_copy[seq.row] = 0
    token = len(decode) + sum(count for _, count in chunks[:num_drafted])
    for seq, count in chunks[num_drafted:]:
        seq.num_scheduled += count
        seq.last_step = books.launched
        if seq.num_scheduled == len(seq.tokens):
            num_choices = sum(1 for _ in seq.request.choices_to_sample(seq))
            if num_choices == 1 and not seq.request.prefill_only:
                books.decode(seq, -1 - token)
            token += num_choices


def _at(values: list[_T], rows: np.ndarray) -> tuple[_T, ...]:
    """The elements at `rows`, in C where it can be."""
    if len(rows) < 2:
        return tuple(values[i] for i in rows)
    if len(rows) == len(values) and rows[0] == 0:  # all of them: indices are ascending
        return tuple(values)
    return itemgetter(*rows.tolist())(values)


def _int32(first: np.ndarray, *others: Seq[int] | np.ndarray) -> np.ndarray:
    """All parts, one after the other."""
    if not any(map(len, others)):
        return first.astype(np.int32)
    parts = [first, *(np.asarray(part, np.int64) for part in others)]
    return np.concatenate(parts, dtype=np.int32, casting="same_kind")
