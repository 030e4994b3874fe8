"""What may come next in an output that follows a grammar.

    output:  | thoughts, at most N tokens | their end | answer .................. | end of sequence
    matcher:   reasoning                    forced at N  answer's grammar           the only token once it is complete

The state is a function of the output's tokens: it is made anew by replaying them wherever a sequence goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
from llguidance import LLMatcher
from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import Internal, InvalidRequest, Overloaded, PagewireError
from pagewire_core.grammar import Vocabulary, check

_KEPT_GRAMMARS = 32  # of some MiB, at worst
# A request whose masks take more CPU time than this is ended: it would slow down all that share its steps.
_FREE_S, _FREE_PER_TOKEN_S = 0.5, 0.002
_QUICK_S = 0.05  # to compile: what takes longer is not compiled again while a step waits, but where the request resumes
_TOO_SLOW = "the grammar takes too long to follow; make it simpler"


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
        self._compile = lru_cache(_KEPT_GRAMMARS)(lambda root, grammar: self._timed(grammar))

    async def make(self, wanted: pb.Constraint, prior: Seq[Seq[int] | None] = (), root: bytes = b"") -> Matchings:
        """A request's matchings, after the output that its choices already have. Raises InvalidRequest.

        root: the request's cache root. What is compiled is kept for requests of the same one, as KV is: the time that
        it saves would tell one tenant the schemas of another.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.make_now, wanted, prior, root)

    def make_now(self, wanted: pb.Constraint, prior: Seq[Seq[int] | None] = (), root: bytes = b"") -> Matchings:
        """As `make`, in the calling thread."""
        constraint, seconds = self._constraint(wanted, partial(self._compile, root))
        matchings = Matchings(constraint, partial(self._anew, wanted, seconds))
        for choice, output in enumerate(prior):
            if output:
                matchings.of(choice).go_on_after(output)
        return matchings

    def _timed(self, grammar: str) -> tuple[LLMatcher, float]:
        started = time.thread_time()
        return self.vocabulary.compile(grammar), time.thread_time() - started

    def _constraint(
        self, wanted: pb.Constraint, compile: Callable[[str], tuple[LLMatcher, float]]
    ) -> tuple[Constraint, float]:
        """With the seconds that compiling takes."""
        nothing: tuple[LLMatcher | None, float] = None, 0.0
        (answer, first), (reasoning, second), (end, third) = (
            compile(grammar) if grammar else nothing
            for grammar in (wanted.answer, wanted.reasoning, wanted.reasoning_end)
        )
        tokens = wanted.reasoning_tokens if wanted.HasField("reasoning_tokens") else None
        return Constraint(answer, reasoning, end, tokens, self.vocabulary.num_words), first + second + third

    def _anew(self, wanted: pb.Constraint, seconds: float, hurried: bool) -> Constraint:
        """For one output alone. What is kept for others is worn, too. hurried: a step waits.

        Raises InvalidRequest, and Overloaded where it takes too long for that: the output is to be resumed.
        """
        self._compile.cache_clear()
        if hurried and seconds > _QUICK_S:
            raise Overloaded("the grammar is worn, and takes too long to be compiled again while others wait")
        constraint, _ = self._constraint(wanted, self._timed)
        return constraint


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
    """Those of one request, a choice each. anew: see Matching."""

    def __init__(self, constraint: Constraint, anew: Callable[[bool], Constraint]) -> None:
        self._constraint, self._anew = constraint, anew
        self._of: dict[int, Matching] = {}

    def of(self, choice: int) -> Matching:
        matching = self._of.get(choice)
        if matching is None:
            matching = self._of[choice] = Matching(self._constraint, self._anew)
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

    def accepts(self, token: int) -> bool:
        """As `take`. Raises InvalidRequest where it is the grammar that has failed, and not the token."""
        if self.take(token):
            return True
        if self.matcher and "satisfy the grammar" not in self.matcher.get_error():
            check(self.matcher)
        return False

    def take(self, token: int) -> bool:
        """Goes on by a token; False if it may not come here, or the matcher has failed."""
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
    """One choice's place in its constraint. error: why it cannot go on. anew: makes the constraint for it alone, told
    whether a step waits for that.

    Copies of a matcher share a lexer, whose bounds are over the texts of all of them: where others have used it up, or
    a text is replayed in fewer steps than it was made in, this one begins anew, and what fails then is its own grammar.
    """

    constraint: Constraint
    anew: Callable[[bool], Constraint]
    error: PagewireError | None = None
    taken: list[int] = field(default_factory=list)  # the output
    _place: _Place = field(init=False)
    _spent_s: float = 0.0

    def __post_init__(self) -> None:
        self._place = _Place.beginning(self.constraint)

    def go_on_after(self, output: Seq[int]) -> None:
        """Before any step waits for it. What cannot be followed any further has its error then."""
        self.extend(output, hurried=False)
        self.fill(np.empty(self.constraint.num_words, np.uint32), hurried=False)

    def extend(self, tokens: Seq[int], hurried: bool = True) -> None:
        """The output's next tokens, which are final."""
        for token in tokens:
            self.taken.append(token)
            if not self._place.take(token):
                self._begin_anew(hurried)
            if self.error:
                return

    def fill(self, mask: np.ndarray, draft: Seq[int] = (), hurried: bool = True) -> None:
        """Writes which tokens may come next, uint32 [words]. draft: guesses of tokens that come before it.

        After a guess that may not come, or an error, anything may: the token will not be used.
        """
        mask.fill(0xFFFFFFFF)
        if self.error:
            return
        started = time.thread_time()
        failed = self._try(mask, draft)
        if not draft:  # the time of guesses is weighed by speculation, and ends no request that would else go on
            self._account(started)
        if failed:
            self._begin_anew(hurried)
            failed = None if self.error else self._try(mask, draft)
        if failed and not draft:
            self._fail(failed)

    def _try(self, mask: np.ndarray, draft: Seq[int]) -> PagewireError | None:
        """Why there is no mask, if it is not for a guess that may not come."""
        place = self._place.copy() if draft else self._place
        try:
            if all(place.accepts(token) for token in draft) and place.matcher:
                self._compute(place.matcher, mask)
        except InvalidRequest as error:
            mask.fill(0xFFFFFFFF)
            return error
        return None

    def _begin_anew(self, hurried: bool) -> None:
        """Each token after its mask, as the output was made."""
        started, mask = time.thread_time(), np.empty(self.constraint.num_words, np.uint32)
        try:
            self._place = place = _Place.beginning(self.anew(hurried))
            for token in self.taken:
                if place.matcher:
                    self._compute(place.matcher, mask)
                if not place.accepts(token):
                    raise Internal("a token of the output does not follow its grammar")
        except PagewireError as error:
            self._fail(error)
        if hurried:
            self._account(started)

    def _compute(self, matcher: LLMatcher, mask: np.ndarray) -> None:
        """Raises InvalidRequest."""
        words = self.constraint.num_words
        target = mask if len(mask) == words else np.empty(words, np.uint32)
        matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        check(matcher)
        if target is not mask:
            mask[:] = target[: len(mask)]

    def _account(self, started: float) -> None:
        self._spent_s += time.thread_time() - started
        if self._spent_s > _FREE_S + _FREE_PER_TOKEN_S * len(self.taken):
            self._fail(InvalidRequest(_TOO_SLOW, "structured_outputs"))

    def _fail(self, error: PagewireError) -> None:
        self.error = self.error or error
