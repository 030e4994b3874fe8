"""Synthetic traces: when requests come, what their prompts share, how long their outputs are.

Token ids stand for text: two prompts that begin alike share blocks, as in reality. All is drawn from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pagewire_core.block_hash import HASH_BLOCK, block_hashes, chain_root

ROOT = chain_root(b"f" * 32)


@dataclass(eq=False)
class Arrival:
    """One request. `then`: what its client sends after it, so many seconds after the answer's end."""

    prompt: list[int]
    output_tokens: int
    session: str = ""
    then: Callable[[Arrival], tuple[float, Arrival] | None] = lambda arrival: None
    hashes: list[bytes] = field(init=False)  # of the prompt's whole blocks
    all_hashes: list[bytes] = field(init=False)  # and of the output's
    at: float = 0.0
    first_token: float | None = None
    finished: float | None = None
    plan: str = ""

    def __post_init__(self) -> None:
        rng = random.Random(self.prompt[-1])
        self.output = _words(rng, self.output_tokens)
        self.all_hashes = block_hashes(ROOT, self.prompt + self.output)
        self.hashes = self.all_hashes[: len(self.prompt) // HASH_BLOCK]

    @property
    def prompt_blocks(self) -> int:
        return -(-len(self.prompt) // HASH_BLOCK)

    @property
    def total_blocks(self) -> int:
        return -(-(len(self.prompt) + self.output_tokens) // HASH_BLOCK)


Trace = Iterator[tuple[float, Arrival]]


def _words(rng: random.Random, count: int) -> list[int]:
    return [rng.getrandbits(31) for _ in range(count)]


def _poisson(rng: random.Random, rate: Callable[[float], float], seconds: float) -> Iterator[float]:
    """Arrival times at a rate that changes; by thinning."""
    most = max(rate(t * seconds / 1000) for t in range(1001))
    now = 0.0
    while (now := now + rng.expovariate(most)) < seconds:
        if rng.random() * most < rate(now):
            yield now


def _length(rng: random.Random, median: int, sigma: float, least: int, most: int) -> int:
    return min(max(int(rng.lognormvariate(0, sigma) * median), least), most)


def chat(rng: random.Random, rate: float, seconds: float) -> Trace:
    """Chats of several turns under a few system prompts: each turn's prompt is all that was said before."""
    systems = [_words(rng, rng.randrange(200, 1200)) for _ in range(20)]

    def turn(history: list[int], session: str, left: int) -> Arrival:
        prompt = history + _words(rng, _length(rng, 60, 0.8, 10, 1500))

        def then(arrival: Arrival) -> tuple[float, Arrival] | None:
            if not left or len(prompt) > 7000:
                return None
            return rng.uniform(1, 6), turn(prompt + arrival.output, session, left - 1)

        return Arrival(prompt, _length(rng, 120, 0.7, 8, 600), session, then)

    for number, at in enumerate(_poisson(rng, lambda t: rate, seconds)):
        yield at, turn(rng.choice(systems), f"s{number}", rng.randrange(0, 7))


def documents(rng: random.Random, rate: float, seconds: float) -> Trace:
    """Questions about documents, some of which are asked about far more than others."""
    texts = [_words(rng, rng.randrange(1500, 6000)) for _ in range(150)]
    weights = [1 / (rank + 1) for rank in range(len(texts))]
    for at in _poisson(rng, lambda t: rate, seconds):
        [text] = rng.choices(texts, weights)
        yield at, Arrival(text + _words(rng, rng.randrange(20, 120)), _length(rng, 80, 0.6, 8, 400))


def bursts(rng: random.Random, rate: float, seconds: float) -> Trace:
    """Prompts that share nothing, four times as many in one second out of eight."""
    for at in _poisson(rng, lambda t: rate * (4 if t % 8 < 1 else 4 / 7), seconds):
        yield at, Arrival(_words(rng, _length(rng, 500, 0.8, 30, 4000)), _length(rng, 120, 0.7, 8, 500))


def long_among_short(rng: random.Random, rate: float, seconds: float) -> Trace:
    """One prompt in twelve is of 6000 tokens or more, the others of 150 or so."""
    for at in _poisson(rng, lambda t: rate, seconds):
        if rng.random() < 1 / 12:
            yield at, Arrival(_words(rng, rng.randrange(6000, 12000)), _length(rng, 150, 0.5, 16, 500))
        else:
            yield at, Arrival(_words(rng, _length(rng, 150, 0.7, 16, 800)), _length(rng, 150, 0.7, 8, 500))


def mixed(rng: random.Random, rate: float, seconds: float) -> Trace:
    """All of these at once."""
    parts = [
        *chat(rng, rate * 0.12, seconds),
        *documents(rng, rate * 0.25, seconds),
        *bursts(rng, rate * 0.2, seconds),
        *long_among_short(rng, rate * 0.15, seconds),
    ]
    yield from sorted(parts, key=lambda part: part[0])
