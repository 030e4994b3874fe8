"""What may come next in an output that follows a grammar.

    output:  | thoughts, at most N tokens | their end | answer .................. | end of sequence
    matcher:   reasoning                    forced at N  answer's grammar           the only token once it is complete

The state is a function of the output's tokens: it is made anew by replaying them wherever a sequence goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from llguidance import LLMatcher
from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import Internal, InvalidRequest, PagewireError
from pagewire_core.grammar import Vocabulary, check

_KEPT_GRAMMARS = 32  # of some MiB, at worst
# A request whose masks take more CPU time than this is ended: it would slow down all that share its steps.
_FREE_S, _FREE_PER_TOKEN_S = 0.5, 0.002


@dataclass(frozen=True)
class Constraint:
    """Matchers at their beginnings, to be copied; see Constraint in common.proto. None: anything goes."""

    answer: LLMatcher | None
    reasoning: LLMatcher | None
    reasoning_end: LLMatcher | None
    reasoning_tokens: int | None
    num_words: int


class Constraints:
    """Compiles them, in a thread of its own: a large grammar may take a while, and steps go on meanwhile."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compile = lru_cache(_KEPT_GRAMMARS)(lambda root, grammar: vocabulary.compile(grammar))

    async def make(self, wanted: pb.Constraint, prior: Seq[Seq[int] | None] = (), root: bytes = b"") -> Matchings:
        """A request's matchings, after the output that its choices already have. Raises InvalidRequest.

        root: the request's cache root. What is compiled is kept for requests of the same one, as KV is: the time that
        it saves would tell one tenant the schemas of another.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.make_now, wanted, prior, root)

    def make_now(self, wanted: pb.Constraint, prior: Seq[Seq[int] | None] = (), root: bytes = b"") -> Matchings:
        """As `make`, in the calling thread."""
        answer, reasoning, end = (
            self._compile(root, grammar) if grammar else None
            for grammar in (wanted.answer, wanted.reasoning, wanted.reasoning_end)
        )
        matchings = Matchings(Constraint(
            answer, reasoning, end,
            wanted.reasoning_tokens if wanted.HasField("reasoning_tokens") else None, self.vocabulary.num_words,
        ))  # fmt: skip
        for choice, output in enumerate(prior):
            matchings.of(choice).extend(output or ())
        return matchings


async def matchings_of(
    constraints: Constraints | None, sampling: pb.SamplingParams, root: bytes, prior: Seq[Seq[int] | None] = ()
) -> Matchings | None:
    """For a request with these parameters: None if its output is free. Raises InvalidRequest."""
    if not sampling.HasField("constraint"):
        return None
    if constraints is None:
        raise InvalidRequest("this model has no tokenizer that structured output could be made with")
    return await constraints.make(sampling.constraint, prior, root)


class Matchings:
    """Those of one request, a choice each."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self._of: dict[int, Matching] = {}

    def of(self, choice: int) -> Matching:
        matching = self._of.get(choice)
        if matching is None:
            matching = self._of[choice] = Matching(self._constraint)
        return matching

    @property
    def error(self) -> PagewireError | None:
        """Why the request cannot go on, if it cannot."""
        return next((m.error for m in self._of.values() if m.error), None)


@dataclass
class _Place:
    """Where an output stands. matcher: of what comes now; None: anything may come."""

    constraint: Constraint
    matcher: LLMatcher | None = None
    thinking: bool = False
    num_thought: int = 0

    @classmethod
    def beginning(cls, constraint: Constraint) -> _Place:
        place = cls(constraint)
        if constraint.reasoning is None:
            place._answer()
        else:
            place.matcher, place.thinking = constraint.reasoning.deep_copy(), True
            place._limit_thoughts()
        return place

    def copy(self) -> _Place:
        matcher = self.matcher and self.matcher.deep_copy()
        return _Place(self.constraint, matcher, self.thinking, self.num_thought)

    def take(self, token: int) -> bool:
        """Goes on by a token; False if it may not come here."""
        if self.matcher is None:
            return True
        if not self.matcher.consume_token(token):
            return False
        if self.thinking:
            self.num_thought += 1
            if self.matcher.is_stopped():
                self._answer()
            else:
                self._limit_thoughts()
        return True

    def _answer(self) -> None:
        answer = self.constraint.answer
        self.matcher, self.thinking = answer and answer.deep_copy(), False

    def _limit_thoughts(self) -> None:
        end, limit = self.constraint.reasoning_end, self.constraint.reasoning_tokens
        if end is not None and limit == self.num_thought:
            self.matcher = end.deep_copy()


@dataclass
class Matching:
    """One choice's place in its constraint. error: why it cannot go on."""

    constraint: Constraint
    error: PagewireError | None = None
    num_taken: int = 0  # tokens of the output
    _place: _Place = field(init=False)
    _spent_s: float = 0.0

    def __post_init__(self) -> None:
        self._place = _Place.beginning(self.constraint)

    def extend(self, tokens: Seq[int]) -> None:
        """The output's next tokens, which are final."""
        for token in tokens:
            self.num_taken += 1
            if not self._place.take(token):
                self._fail(Internal("a token of the output does not follow its grammar"))
                return

    def fill(self, mask: np.ndarray, draft: Seq[int] = ()) -> None:
        """Writes which tokens may come next, uint32 [words]. draft: guesses of tokens that come before it.

        After a guess that may not come, or an error, anything may: the token will not be used.
        """
        mask.fill(0xFFFFFFFF)
        place = self._place
        if draft:
            place = place.copy()
            if not all(place.take(token) for token in draft):
                return
        matcher = place.matcher
        if self.error or matcher is None:
            return
        started = time.thread_time()
        self._compute(matcher, mask)
        self._spent_s += time.thread_time() - started
        if self._spent_s > _FREE_S + _FREE_PER_TOKEN_S * self.num_taken:
            self._fail(InvalidRequest("the grammar takes too long to follow; make it simpler", "structured_outputs"))

    def _compute(self, matcher: LLMatcher, mask: np.ndarray) -> None:
        words = self.constraint.num_words
        target = mask if len(mask) == words else np.empty(words, np.uint32)
        matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        try:
            check(matcher)
        except InvalidRequest as error:
            self._fail(error)
            target.fill(0xFFFFFFFF)
        if target is not mask:
            mask[:] = target[: len(mask)]

    def _fail(self, error: PagewireError) -> None:
        self.error = self.error or error
