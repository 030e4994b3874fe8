"""Which tokens may be chosen in a step: the masks of the rows whose outputs follow a grammar."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from pagewire_engine.constraint import Matching
from pagewire_engine.continued import Continued
from pagewire_engine.sampler import SampleRow

_ALL = np.uint32(0xFFFFFFFF)


def allowed_tokens(rows: Seq[SampleRow], vocab_size: int) -> np.ndarray:
    """See Batch.allowed. Brings the rows' matchings up to date; one that has failed allows all and says so.

    Without the engine's lock: a row takes some 20 microseconds, and a large grammar a thousand times that.
    """
    allowed = np.full((len(rows), -(-vocab_size // 32)), _ALL)
    for row, mask in zip(rows, allowed, strict=True):
        if row.matching:
            _fill(row, row.matching, mask)
    return allowed


def _fill(row: SampleRow, matching: Matching, mask: np.ndarray) -> None:
    tokens = row.tokens
    begin = row.num_prompt + matching.num_taken
    if isinstance(tokens, Continued):
        matching.extend(tokens.known(begin))
        matching.fill(mask, tokens.more)
    else:
        matching.extend(tokens[begin:])
        matching.fill(mask)
    if len(tokens) - row.num_prompt < row.params.min_tokens:
        _ban(mask, row.params.ends)


def _ban(mask: np.ndarray, ids: frozenset[int]) -> None:
    """Takes `ids` out, unless nothing else is left: the text is complete then."""
    without = mask.copy()
    for token in ids:
        without[token // 32] &= ~np.uint32(1 << token % 32)
    if without.any():
        mask[:] = without
