"""Prompt lookup: drafts copied from what the sequence itself said before (Saxena, "Prompt Lookup Decoding", 2023)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_MOST_CANDIDATES = 16  # occurrences of the shortest n-gram that are compared; bounds the work of a step


class NgramIndex:
    """Where each n-gram of one growing sequence occurred; nothing is looked at twice.

        tokens   a b c d ... a b c | d?      the longest suffix of `smallest` to `largest` tokens that
                       ^ end       ^ now     occurred before; of equally long ones the latest

    One dict entry and one link per token: n-grams of `smallest` tokens, each linked to its occurrence
    before, as LZ77's hash chains are; longer matches are found by comparing backwards.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        self._smallest, self._largest = smallest, largest
        self._latest: dict[tuple[int, ...], int] = {}  # n-gram -> its end, the position that follows it
        self._before = array("i")  # end -> the end of the occurrence before it, -1: none
        self._before.extend([-1] * smallest)

    def extend(self, tokens: Sequence[int], most: int) -> int:
        """Indexes up to `most` more of the n-grams that end before the last token; returns how many."""
        begin = len(self._before)
        stop = min(len(tokens), begin + most)
        latest, before, smallest = self._latest, self._before, self._smallest
        for end in range(begin, stop):
            ngram = tuple(tokens[end - smallest : end])
            before.append(latest.get(ngram, -1))
            latest[ngram] = end
        return max(stop - begin, 0)

    def lookup(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that followed the match, [] without one or while `extend` is behind.

        A match that ends less than `count` tokens ago is a repetition: it goes on as it began.
        """
        now = len(tokens)
        if len(self._before) < now:
            return []
        end = self._best_end(tokens)
        if end < 0:
            return []
        period = now - end
        return [tokens[end + i % period] for i in range(count)]

    def _best_end(self, tokens: Sequence[int]) -> int:
        now = len(tokens)
        candidate = self._latest.get(tuple(tokens[now - self._smallest :]), -1)
        best, best_length = -1, 0
        for _ in range(_MOST_CANDIDATES):
            if candidate < 0 or best_length == self._largest:
                break
            length = self._smallest
            most = min(self._largest, candidate)
            while length < most and tokens[candidate - length - 1] == tokens[now - length - 1]:
                length += 1
            if length > best_length:
                best, best_length = candidate, length
            candidate = self._before[candidate]
        return best
