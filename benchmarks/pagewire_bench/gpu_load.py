"""Loads for an engine in this process, and what they took."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass
from statistics import median

from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, Failed, Token
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request


@dataclass(frozen=True)
class Outcome:
    """Of `num_seqs` requests that came at once. Seconds; a decode step is one in which all of them decode."""

    num_seqs: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    tokens_per_s: float
    first_token_median_s: float
    first_token_last_s: float
    decode_steps: int
    decode_step_median_ms: float
    decode_step_p90_ms: float


class Client:
    """One greedy request and when its tokens came."""

    def __init__(self, prompt: list[int], num_tokens: int, logprobs: int | None = None) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs)
        self.tokens: list[Token] = []
        self.times: list[float] = []
        self.request = Request("benchmark", prompt, bytes(32), params, 1, self._on_event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Token):
            self.tokens.append(event)
            self.times.append(time.perf_counter())


def random_prompts(num_seqs: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_seqs)]


def complete(engine: Engine, clients: list[Client]) -> float:
    """Seconds from the first request to the last token."""
    started = time.perf_counter()
    for client in clients:
        engine.submit(client.request)
    while engine.step():
        pass
    return time.perf_counter() - started


def run_load(engine: Engine, num_seqs: int, prompt_tokens: int, output_tokens: int, vocab_size: int) -> Outcome:
    clients = [Client(prompt, output_tokens) for prompt in random_prompts(num_seqs, prompt_tokens, vocab_size)]
    started = time.perf_counter()
    seconds = complete(engine, clients)
    first = sorted(client.times[0] - started for client in clients)
    steps = _decode_steps(clients)
    return Outcome(
        num_seqs, prompt_tokens, output_tokens, seconds, num_seqs * output_tokens / seconds, median(first), first[-1],
        len(steps), 1e3 * median(steps), 1e3 * steps[int(0.9 * len(steps))],
    )  # fmt: skip


def _decode_steps(clients: list[Client]) -> list[float]:
    """Times between tokens of the request that began last, while all others still run; sorted."""
    begun = max(client.times[0] for client in clients)
    ended = min(client.times[-1] for client in clients)
    last = max(clients, key=lambda client: client.times[0])
    times = [at for at in last.times if begun <= at <= ended] or last.times
    return sorted(later - earlier for earlier, later in itertools.pairwise(times)) or [float("nan")]


def prefill_seconds(engine: Engine, num_tokens: int, vocab_size: int, repeats: int = 3) -> float:
    """Of one prompt until its token: the best of a few."""
    prompts = random_prompts(repeats, num_tokens, vocab_size, seed=1)
    return min(complete(engine, [Client(prompt, 1)]) for prompt in prompts)
