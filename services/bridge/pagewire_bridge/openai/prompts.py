"""How likely a prompt's own tokens were: vLLM's `prompt_logprobs`, and `echo` with `logprobs`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pagewire.v1.inference_pb2 import TokenText

from pagewire_bridge.openai.shapes import CompletionShape, logprob_of, text_of

Listed = list[dict[str, dict[str, Any]] | None]


def listed(tokens: Iterable[TokenText], num_top: int) -> Listed:
    """vLLM's list: for every token its own entry and those of the best, by token id; null for the first one."""
    entries: Listed = []
    for token in tokens:
        if not token.HasField("logprob"):
            entries.append(None)
            continue
        of_token = {str(token.token_id): _entry(token, token.rank)}
        for rank, top in enumerate(token.top[:num_top], 1):
            of_token.setdefault(str(top.token_id), _entry(top, rank))
        entries.append(of_token)
    return entries


def _entry(token: TokenText, rank: int) -> dict[str, Any]:
    return {"logprob": logprob_of(token), "rank": rank, "decoded_token": text_of(token)}


class Echo:
    """The prompts' tokens, each once before the tokens of every choice that goes on from it.

    prompts: of each prompt, complete when its first delta is there. per_prompt: choices. num_top: how many of the best
    are told.
    """

    def __init__(
        self, shape: CompletionShape, prompts: Sequence[Sequence[TokenText]], per_prompt: int, num_top: int
    ) -> None:
        self._shape, self._prompts, self._per_prompt, self._num_top = shape, prompts, per_prompt, num_top
        self._told: set[int] = set()

    def before(self, index: int, text: str) -> list[TokenText]:
        """With the choice's first delta, whose text is the prompt's, its tokens; then none."""
        if index in self._told:
            return []
        self._told.add(index)
        tokens = [self._cut(token) for token in self._prompts[index // self._per_prompt]]
        self._shape.begin(index, tokens, text)
        return tokens

    def _cut(self, token: TokenText) -> TokenText:
        if len(token.top) <= self._num_top:
            return token
        cut = TokenText()
        cut.CopyFrom(token)
        del cut.top[self._num_top :]
        return cut
