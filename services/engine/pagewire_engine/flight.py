"""A step between its launch and the reading of its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog
from pagewire_core.errors import Internal, PagewireError

from pagewire_engine.batch import Batch
from pagewire_engine.model_runner import Launched, Runner
from pagewire_engine.sampler import Sampled
from pagewire_engine.scoring import Scores

log = structlog.get_logger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Flight:
    """drafts: of the sequences that follow the decoding ones in the batch."""

    number: int
    batch: Batch
    drafts: tuple[tuple[int, ...], ...]
    started: float
    launched: Launched | PagewireError

    @classmethod
    def launch(cls, runner: Runner, number: int, batch: Batch, drafts: tuple[tuple[int, ...], ...]) -> Flight:
        return cls(number, batch, drafts, time.perf_counter(), _attempt(lambda: runner.launch(batch)))

    def tokens(self) -> list[Sampled] | PagewireError:
        """Waits until the step is done; an error if it is lost."""
        launched = self.launched
        return launched if isinstance(launched, PagewireError) else _attempt(launched.tokens)

    def scores(self) -> Scores | None:
        """Of a step that is done and not lost."""
        if self.batch.scored is None or isinstance(self.launched, PagewireError):
            return None
        return self.launched.scores()

    @property
    def num_decode(self) -> int:
        """Sequences that decode, with drafts or without."""
        return self.batch.num_decode + len(self.drafts)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(count for _, count in self.batch.scheduled[self.num_decode :])

    @property
    def prefill_work(self) -> tuple[int, float]:
        """Prompt tokens, and the tokens that each of them attends to, added up."""
        chunks = [count for _, count in self.batch.scheduled[self.num_decode :]]
        ends = self.batch.seq_lens[self.num_decode :].tolist()
        return sum(chunks), sum(count * (end - count / 2) for count, end in zip(chunks, ends, strict=True))

    @property
    def decode_work(self) -> tuple[int, int]:
        """Sequences that decode, and their tokens."""
        return self.num_decode, int(self.batch.seq_lens[: self.num_decode].sum())


def _attempt(work: Callable[[], _T]) -> _T | PagewireError:
    try:
        return work()
    except Exception as error:  # the step is lost, not the worker: its requests fail, the others go on
        log.exception("step failed")
        return Internal(f"a step of the engine failed: {type(error).__name__}")
