"""What the engine says of a request while it works on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import PagewireError

from pagewire_engine.sampler import Sampled
from pagewire_engine.scoring import Scores


@dataclass(frozen=True)
class Started:
    """The request is in a batch; `cached_tokens` of its prompt were in the prefix cache."""

    cached_tokens: int


@dataclass(frozen=True)
class Progress:
    """The KV of the first `num_computed` prompt tokens is final (prefill-only requests).

    ahead: up to which token it is so too in the first layers, and in how many; the step is still running.
    """

    num_computed: int
    ahead: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class PromptScores:
    """How likely the prompt's tokens from `begin` on were; ascending and without gaps, before the first tokens."""

    begin: int
    scores: Scores


@dataclass(frozen=True)
class FirstTokens:
    """The first token of every choice, choices in order."""

    tokens: tuple[Sampled, ...]


class Token(NamedTuple):
    """One more token of one choice (the first one too), with the end of the choice if it is its last."""

    choice: int
    sampled: Sampled
    finish_reason: pb.FinishReason | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True)
class Finished:
    """Every choice has ended."""

    num_preemptions: int


@dataclass(frozen=True)
class Failed:
    error: PagewireError


Event = Started | Progress | PromptScores | FirstTokens | Token | Finished | Failed
