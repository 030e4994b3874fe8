"""What is asked of an engine in process, and the least time that it can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagewire_bench.limits import Limits
from pagewire_bench.needs import Needs

WARM_STEPS = 2
STREAM_TOKENS = 128  # of a stream's prompt, and of its answer: as in pagewire_bench.loads
STREAM_ROUNDS = 2  # requests for each stream


@dataclass(frozen=True)
class Case:
    """kind: decode, `num_seqs` sequences after `context` tokens; prefill, one prompt of `context` tokens; streams, a
    closed loop with `num_seqs` requests in flight, prompts and answers of STREAM_TOKENS."""

    kind: str
    num_seqs: int
    context: int
    steps: int = 0  # timed, of decode

    @property
    def name(self) -> str:
        if self.kind == "streams":
            return f"{self.num_seqs} streams"
        count = f"{self.num_seqs} x " if self.kind == "decode" else ""
        return f"{self.kind} {count}{self.context} tokens"

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.context + {"decode": WARM_STEPS + self.steps + 1, "prefill": 1, "streams": STREAM_TOKENS}[self.kind]

    @property
    def num_tokens(self) -> int:
        """Tokens that one measured time stands for: prompt tokens of prefill, else output tokens."""
        if self.kind == "streams":
            return self.num_seqs * STREAM_ROUNDS * STREAM_TOKENS
        return self.num_seqs if self.kind == "decode" else self.context

    def least_ms(self, needs: Needs, limits: Limits, weights: str, kv_bytes_per_token: int) -> float:
        """What the limits allow for the work that one measured time stands for."""

        def step(context: float) -> float:
            return needs.decode_ms(limits, weights, self.num_seqs, self.num_seqs * context * kv_bytes_per_token)

        if self.kind == "prefill":
            return needs.prefill_ms(limits, weights, self.context)
        if self.kind == "decode":
            return step(self.context + WARM_STEPS + self.steps / 2)
        prompts = self.num_seqs * needs.prefill_ms(limits, weights, self.context)
        return STREAM_ROUNDS * (prompts + (STREAM_TOKENS - 1) * step(self.context + STREAM_TOKENS / 2))


def make_cases(
    num_seqs: Sequence[int], contexts: Sequence[int], prompts: Sequence[int], streams: Sequence[int], steps: int,
    longest: int,
) -> list[Case]:  # fmt: skip
    """Those that fit a model of `longest` positions."""
    cases = [Case("decode", num, context, steps) for context in contexts for num in num_seqs]
    cases += [Case("prefill", 1, num_tokens) for num_tokens in prompts]
    cases += [Case("streams", num, STREAM_TOKENS) for num in streams]
    return [case for case in cases if case.max_len <= longest]
