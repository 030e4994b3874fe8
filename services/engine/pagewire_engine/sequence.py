"""A request and its sequences: tokens, KV blocks and how far they are filled. No policy."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from pagewire_core.block_hash import PageKeys

from pagewire_engine.constraint import Matchings
from pagewire_engine.events import Event
from pagewire_engine.sampler import SampleRow
from pagewire_engine.sampling_params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """The tokens of one choice of a request.

        tokens        |---------- prompt ----------|---- output ----|
        KV in blocks  |-- num_computed --|-- num_scheduled --|
        next step      computes tokens[num_scheduled : num_scheduled + chunk]

    num_scheduled is ahead of num_computed by what launched steps compute. When it reaches len(tokens), the
    step's logits give the next token, and the sequence has a row of `DecodeRows`, which says where it is from
    then on.
    """

    request: Request
    choice: int
    tokens: list[int]
    num_prompt: int
    keys: PageKeys
    num_computed: int = 0
    num_scheduled: int = 0  # only while it has no row
    num_registered: int = 0  # blocks already offered to the prefix cache
    block_table: list[int] = field(default_factory=list)
    finished: bool = False
    num_preemptions: int = 0
    num_accepted: int = 0  # draft tokens
    seat: int = -1  # row of the engine's block tables while it runs
    row: int = -1  # index in DecodeRows while it decodes
    last_step: int = 0  # number of the last step with it; only while it has no row
    draft: list[int] = field(default_factory=list)  # guesses of its next tokens, for the next step
    expected_hit: int = 0  # tokens of its prefix that were cached when it began to wait
    queued: bool = False  # it has waited here to be computed, and so needs one of the `max_num_seqs` places
    wanted_blocks: int = 0  # when it was last refused a place: the free blocks that it would have taken

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def fork(self, choice: int) -> Sequence:
        """A sibling with the same prompt; the caller takes the block references."""
        return Sequence(
            request=self.request,
            choice=choice,
            tokens=list(self.tokens),
            num_prompt=self.num_prompt,
            keys=self.keys.copy(),
            num_computed=self.num_computed,
            num_scheduled=self.num_computed,
            num_registered=self.num_registered,
            queued=self.queued,
            block_table=list(self.block_table),
        )


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
    matchings: Matchings | None = None  # of the grammar that its output follows
    prompt_logprobs: int | None = None  # log probabilities of its tokens are wanted, and of so many of the best
    num_scored: int = 1  # leading tokens of the prompt that need none any more; the first one has none
    sequences: list[Sequence] = field(default_factory=list)  # one, the prompt's, until it is computed; then n
    cancelled: bool = False
    failed: bool = False  # what its later steps compute may be built on what is not there
    forked: bool = False
    done: bool = False  # Finished was emitted
    arrived: float = field(default_factory=time.monotonic)

    def to_score(self, begin: int, end: int) -> range:
        """Tokens of the prompt that are to be scored by the rows from `begin` to `end`: those after them."""
        if self.prompt_logprobs is None:
            return range(0)
        return range(max(begin + 1, self.num_scored), min(end + 1, len(self.prompt)))

    @property
    def num_readable(self) -> int:
        """Leading tokens whose KV may come from the prefix cache: those whose rows nobody wants the logits of."""
        whole = self.prompt_logprobs is None or self.num_scored == len(self.prompt)
        return sys.maxsize if whole else self.num_scored - 1

    def sample_row(self, choice: int, tokens: Seq[int]) -> SampleRow:
        """To choose the token of a choice that follows `tokens`, prompt included."""
        matching = self.matchings.of(choice) if self.matchings else None
        return SampleRow(self.params, choice, tokens, len(self.prompt), matching)

    def choices_to_sample(self, seq: Sequence) -> Iterable[int]:
        """Choices whose next token `seq`'s logits give: all of them at the end of the shared prompt."""
        return (seq.choice,) if self.forked else range(self.n)
