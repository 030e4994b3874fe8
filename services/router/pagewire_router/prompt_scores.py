"""How likely the prompt's own tokens were, as a worker tells it in parts, and as the client is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.tokenizer import Tokenizer

_TOKENS_PER_MESSAGE = 256  # with 20 alternatives each, some milliseconds of work between two turns of the loop


class PromptScores:
    """Of one attempt: an attempt that replaces a lost one tells all of them anew."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._prompt_ids = prompt_ids
        self._parts: list[common_pb2.PromptLogprobs] = []
        self._num_known = 1  # the first token has none

    def rewind(self) -> None:
        self._parts.clear()
        self._num_known = 1

    def take(self, part: common_pb2.PromptLogprobs) -> None:
        """A part that does not follow what is known leaves the whole incomplete."""
        if part.begin == self._num_known:
            self._parts.append(part)
            self._num_known += len(part.logprobs)

    @property
    def complete(self) -> bool:
        return self._num_known == len(self._prompt_ids)

    def responses(self, tokenizer: Tokenizer) -> Iterator[inference_pb2.GenerateResponse]:
        """The whole prompt, in messages of bounded size."""
        response = inference_pb2.GenerateResponse()
        for token in self._tokens(tokenizer):
            response.prompt_tokens.tokens.append(token)
            if len(response.prompt_tokens.tokens) == _TOKENS_PER_MESSAGE:
                yield response
                response = inference_pb2.GenerateResponse()
        if response.HasField("prompt_tokens"):
            yield response

    def _tokens(self, tokenizer: Tokenizer) -> Iterator[inference_pb2.TokenText]:
        yield _text(self._prompt_ids[0], tokenizer)
        for part in self._parts:
            for i, (logprob, rank) in enumerate(zip(part.logprobs, part.ranks, strict=True)):
                token = _text(self._prompt_ids[part.begin + i], tokenizer)
                token.logprob, token.rank = logprob, rank
                top = slice(i * part.num_top, (i + 1) * part.num_top)
                for token_id, value in zip(part.top_ids[top], part.top_logprobs[top], strict=True):
                    token.top.add(token_id=token_id, bytes=tokenizer.token_bytes(token_id), logprob=value)
                yield token


def _text(token_id: int, tokenizer: Tokenizer) -> inference_pb2.TokenText:
    special = token_id in tokenizer.special_ids
    return inference_pb2.TokenText(token_id=token_id, bytes=tokenizer.token_bytes(token_id), special=special)
