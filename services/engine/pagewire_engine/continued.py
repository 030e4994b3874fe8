"""A sequence's tokens and guesses that follow them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import overload


class Continued(Seq[int]):
    """`tokens` followed by `more`, without a copy: what a draft's row sees as the tokens so far."""

    def __init__(self, tokens: Seq[int], more: Seq[int]) -> None:
        self._tokens, self.more, self._length = tokens, more, len(tokens)  # `tokens` grows when the step is done

    def __len__(self) -> int:
        return self._length + len(self.more)

    def __iter__(self) -> Iterator[int]:
        yield from self._tokens[: self._length]
        yield from self.more

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return [*self][index]

    def known(self, begin: int) -> Seq[int]:
        """The tokens themselves from `begin` on."""
        return self._tokens[begin : self._length]
