"""What guesses tokens ahead of a decoding sequence, as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from pagewire_engine.sequence import Sequence


class Proposer(Protocol):
    """Called by the engine's thread, without its lock; `ended` by any thread, with it."""

    def propose(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Guesses of the next tokens of each sequence that decodes, none or more. Once a step."""
        ...

    def observe(self, proposed: int, accepted: int, num_sequences: int, milliseconds: float) -> None:
        """Told of every step that only decoded: guesses in it, those that came true, sequences and duration."""
        ...

    def ended(self, seq: Sequence) -> None:
        """The sequence will not be proposed for again."""
        ...


def bounded(proposed: Seq[tuple[Sequence, list[int]]], max_model_len: int) -> list[Sequence]:
    """Sets `draft` of each sequence to what can be of use to it; returns those that have any.

    A step gives a token more than the guesses that it proves.
    """
    drafted = []
    for seq, draft in proposed:
        limit = min(seq.num_prompt + seq.request.params.max_tokens, max_model_len)
        seq.draft = draft[: max(limit - len(seq.tokens) - 1, 0)]
        if seq.draft and seq.row >= 0:
            drafted.append(seq)
    return drafted
