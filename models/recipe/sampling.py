"""Random choices of the corpus: skewed, so that greedy decoding has clear margins."""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")
_WEIGHTS = {1: [1.0], 2: [0.7, 0.3], 3: [0.6, 0.3, 0.1]}


def pick(rng: Random, options: Sequence[T]) -> T:
    """One template variant, the first one likeliest (0.6 / 0.3 / 0.1 for three)."""
    weights = _WEIGHTS.get(len(options)) or [0.5, 0.25] + [0.25 / (len(options) - 2)] * (len(options) - 2)
    return rng.choices(options, weights)[0]


def skewed(rng: Random, options: Sequence[T]) -> T:
    """One filler for a slot nobody asked for: half of the draws give the first option, the rest any."""
    return options[0] if rng.random() < 0.5 else rng.choice(options)


def coin(rng: Random, probability: float) -> bool:
    """True with this probability."""
    return rng.random() < probability


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def pseudo_word(rng: Random) -> str:
    """A made-up word: copying it needs copying, not remembering."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return "".join(syllables) + rng.choice(["", "n", "r", "s", "x", "l", "k"])
