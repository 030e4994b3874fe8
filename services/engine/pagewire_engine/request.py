"""What the engine works on, and what it says while it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import PagewireError

from pagewire_engine.sampler import Sampled
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Sequence


@dataclass(frozen=True)
class Started:
    """The request is in a batch; `cached_tokens` of its prompt were in the prefix cache."""

    cached_tokens: int


@dataclass(frozen=True)
class Progress:
    """The KV of the first `num_computed` prompt tokens is final (prefill-only requests)."""

    num_computed: int


@dataclass(frozen=True)
class FirstTokens:
    """The first token of every choice, choices in order."""

    tokens: tuple[Sampled, ...]


@dataclass(frozen=True)
class Token:
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


Event = Started | Progress | FirstTokens | Token | Finished | Failed


@dataclass(eq=False)
class Request:
    """A prompt with n continuations.

    emit is called with each event, in order. prefill_only: the engine stops
    after FirstTokens and holds the prompt's blocks until `Engine.release`.
    """

    request_id: str
    prompt: list[int]
    cache_root: bytes
    params: SamplingParams
    n: int
    emit: Callable[[Event], None]
    prefill_only: bool = False
    sequences: list[Sequence] = field(default_factory=list)  # one, the prompt's, until it is computed; then n
    cancelled: bool = False
    forked: bool = False
    done: bool = False  # Finished was emitted
    arrived: float = field(default_factory=time.monotonic)

    def choices_to_sample(self, seq: Sequence) -> Iterable[int]:
        """Choices whose next token `seq`'s logits give: all of them at the end of the shared prompt."""
        return (seq.choice,) if self.forked else range(self.n)
