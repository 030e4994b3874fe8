"""What is asked: prompts of a length in tokens, with a part that all of them share.

No tokenizer is used. Prompts are random words, and the server's own `usage` says how many tokens a word
makes; so the same workload can be given to any server.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = (
    "river stone light morning paper garden winter summer bridge market silver window letter music story table "
    "water forest island captain doctor teacher farmer animal flower bread apple honey sugar coffee picture mirror "
    "corner street village city country mountain valley ocean harbor engine wheel hammer ladder basket bottle "
    "candle blanket pillow jacket button pocket ticket number answer question reason moment minute evening autumn "
    "spring thunder shadow color yellow purple orange green quiet simple gentle clever hungry little heavy narrow "
    "early later never always under between before after together along across behind beside during again because "
    "carry follow gather listen wander remember forget build open close begin finish travel"
).split()


@dataclass(frozen=True)
class Lengths:
    """Token counts between `low` and `high`, both included, each equally likely."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    @classmethod
    def around(cls, length: int, ratio: float) -> Lengths:
        """From length * (1 - ratio) to length * (1 + ratio), and never less than 1."""
        return cls(max(1, int(length * (1 - ratio))), max(1, int(length * (1 + ratio))))


@dataclass(frozen=True)
class Calibration:
    """How many prompt tokens the server makes of text: `fixed` (template, bos) and `per_word`."""

    fixed: float
    per_word: float

    @classmethod
    def from_probes(cls, few: tuple[int, int], many: tuple[int, int]) -> Calibration:
        """From two (words, prompt tokens) that a server reported. Raises ValueError if they make no sense."""
        per_word = (many[1] - few[1]) / (many[0] - few[0])
        if per_word <= 0:
            raise ValueError(f"the server counts {few[1]} tokens for {few[0]} words and {many[1]} for {many[0]}")
        return cls(max(0.0, few[1] - per_word * few[0]), per_word)

    def words_for(self, tokens: int) -> int:
        return max(1, round((tokens - self.fixed) / self.per_word))


@dataclass(frozen=True)
class Request:
    index: int
    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True)
class RandomWorkload:
    """Request number i is a function of (seed, i): the same for every server and every pace.

    The first `prefix_len` tokens are the same in all prompts, and come before those of `prompt_len`.
    """

    calibration: Calibration
    prompt_len: Lengths
    output_len: Lengths
    prefix_len: int
    seed: int

    def request(self, index: int) -> Request:
        rng = random.Random(f"{self.seed}/{index}")
        num_words = self.calibration.words_for(self.prefix_len + self.prompt_len.draw(rng))
        max_tokens = self.output_len.draw(rng)
        num_shared = min(round(self.prefix_len / self.calibration.per_word), num_words)
        shared = random.Random(f"{self.seed}/shared")
        words = [*random_words(num_shared, shared), *random_words(num_words - num_shared, rng)]
        return Request(index, " ".join(words), max_tokens)


@dataclass(frozen=True)
class ListedWorkload:
    """Prompts with the number of tokens to answer, from a file; begun again when they run out."""

    listed: Sequence[tuple[str, int]]

    def request(self, index: int) -> Request:
        prompt, max_tokens = self.listed[index % len(self.listed)]
        return Request(index, prompt, max_tokens)


def random_words(count: int, rng: random.Random) -> list[str]:
    return [rng.choice(WORDS) for _ in range(count)]
