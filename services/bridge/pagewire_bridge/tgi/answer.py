"""Deltas of the router as TGI's answers: whole, and token by token."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from pagewire.v1 import common_pb2
from pagewire.v1.inference_pb2 import Accepted, Delta, TokenText
from pagewire_core.errors import Internal, PagewireError

from pagewire_bridge import sse
from pagewire_bridge.generation import Generation
from pagewire_bridge.tgi.errors import error_object

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Asked:
    """What of a request its answer depends on. samples: tokens are drawn, by a seed that the answer tells."""

    inputs: str
    full_text: bool
    details: bool
    with_top_tokens: bool
    samples: bool


@dataclass
class _Output:
    """One choice as far as it has come."""

    asked: Asked
    accepted: Accepted
    text: list[str] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    top_tokens: list[list[dict[str, Any]]] = field(default_factory=list)
    finish_reason: str = ""
    prompt: Sequence[TokenText] = ()  # where the client asked for it

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, delta: Delta) -> None:
        self.text.append(delta.text)
        for token in delta.tokens:
            self.tokens.append({**_token(token), "text": self._decoder.decode(token.bytes), "special": token.special})
            self.top_tokens.append([{**_token(t), "special": t.special} for t in token.top])
        if delta.finish_reason == common_pb2.FINISH_REASON_LENGTH:
            self.finish_reason = "length"
        elif delta.finish_reason == common_pb2.FINISH_REASON_STOP:
            self.finish_reason = "stop_sequence" if delta.HasField("stop_string") else "eos_token"

    @property
    def generated_text(self) -> str:
        return (self.asked.inputs if self.asked.full_text else "") + "".join(self.text)

    @property
    def mean_logprob(self) -> float:
        return sum(t["logprob"] for t in self.tokens) / max(len(self.tokens), 1)

    def ending(self) -> dict[str, Any]:
        seed = self.accepted.seed if self.asked.samples and self.accepted.HasField("seed") else None
        return {"finish_reason": self.finish_reason, "generated_tokens": len(self.tokens), "seed": seed}

    def details(self) -> dict[str, Any]:
        tops = {"top_tokens": self.top_tokens} if self.asked.with_top_tokens else {}
        prefill = [_token(token) for token in self.prompt]
        return {**self.ending(), "prefill": prefill, "tokens": self.tokens, **tops}


def _token(token: TokenText) -> dict[str, Any]:
    logprob = token.logprob if token.HasField("logprob") else None  # the prompt's first token has none
    return {"id": token.token_id, "text": token.bytes.decode("utf-8", "replace"), "logprob": logprob}


async def whole(asked: Asked, generation: Generation, num_choices: int) -> dict[str, Any]:
    """Of several choices the one with the highest mean log probability is the answer. Raises PagewireError."""
    accepted, prompt = generation.accepted[0], generation.prompt_tokens[0]
    outputs = [_Output(asked, accepted, prompt=prompt) for _ in range(num_choices)]
    async for index, delta in generation.deltas():
        outputs[index].take(delta)
    best = max(outputs, key=lambda output: output.mean_logprob) if num_choices > 1 else outputs[0]
    answer: dict[str, Any] = {"generated_text": best.generated_text}
    if asked.details:
        answer["details"] = best.details()
        if num_choices > 1:
            others = [output for output in outputs if output is not best]
            answer["details"]["best_of_sequences"] = [
                {"generated_text": other.generated_text, **other.details()} for other in others
            ]
    return answer


async def stream(asked: Asked, generation: Generation) -> AsyncGenerator[bytes]:
    """An event for every token, the last with the whole text; after a failure one error event, and no more."""
    output, sent = _Output(asked, generation.accepted[0]), 0
    try:
        async for _, delta in generation.deltas():
            output.take(delta)
            # The last token waits: it may be the one that ends the choice.
            while sent < len(output.tokens) - 1:
                yield sse.event(_event(output, sent))
                sent += 1
        if not output.tokens:
            raise Internal("the answer ended without a token")
        ending = {**output.ending(), "input_length": output.accepted.prompt_tokens}
        yield sse.event({**_event(output, sent), "generated_text": output.generated_text, "details": ending})
    except PagewireError as error:
        log.warning("stream failed", error=error.message)
        yield sse.event(error_object(error))


def _event(output: _Output, i: int) -> dict[str, Any]:
    tops = {"top_tokens": output.top_tokens[i]} if output.asked.with_top_tokens else {}
    return {"index": i + 1, "token": output.tokens[i], **tops, "generated_text": None, "details": None}
