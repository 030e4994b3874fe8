"""Which tokens may be chosen in a step: grammars, allowed_token_ids, bad_words, and min_tokens beside these.

Each takes tokens out of what the one before has left, unless nothing would be left: a text that is complete ends.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import lru_cache

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
    allowed[:, -1] >>= np.uint32(-vocab_size % 32)  # bits beyond the vocabulary are no tokens that could be left
    for row, mask in zip(rows, allowed, strict=True):
        if row.params.masked:
            _fill(row, mask)
    return allowed


def _fill(row: SampleRow, mask: np.ndarray) -> None:
    tokens, params = row.tokens, row.params
    if row.matching:
        _follow(row.matching, tokens, row.num_prompt, mask)
    if params.allowed_token_ids:
        _keep(mask, _words(params.allowed_token_ids, len(mask)))
    if params.bad_tokens:
        _keep(mask, ~_words(_completed(params.bad_tokens, tokens, row.num_prompt), len(mask)))
    if len(tokens) - row.num_prompt < params.min_tokens:
        _keep(mask, ~_words(params.ends, len(mask)))


def _follow(matching: Matching, tokens: Seq[int], num_prompt: int, mask: np.ndarray) -> None:
    begin = num_prompt + len(matching.taken)
    if isinstance(tokens, Continued):
        matching.extend(tokens.known(begin))
        matching.fill(mask, tokens.more)
    else:
        matching.extend(tokens[begin:])
        matching.fill(mask)


def _completed(sequences: Seq[tuple[int, ...]], tokens: Seq[int], num_prompt: int) -> frozenset[int]:
    """The tokens that would now be the last of one of these sequences; the prompt is no part of what is written."""
    longest = max(map(len, sequences)) - 1
    recent = tuple(tokens[max(num_prompt, len(tokens) - longest) :]) if longest else ()
    return frozenset(s[-1] for s in sequences if len(s) == 1 or recent[-len(s) + 1 :] == s[:-1])


@lru_cache(maxsize=256)
def _words(ids: frozenset[int], num_words: int) -> np.ndarray:
    """uint32 [num_words], a bit for each id. Not to be changed: they are shared."""
    words = np.zeros(num_words, np.uint32)
    listed = np.fromiter(ids, np.int64, len(ids))
    np.bitwise_or.at(words, listed // 32, np.uint32(1) << (listed % 32).astype(np.uint32))
    return words


def _keep(mask: np.ndarray, kept: np.ndarray) -> None:
    """Takes out what is not kept, unless nothing else is left."""
    both = mask & kept
    if both.any():
        mask[:] = both
