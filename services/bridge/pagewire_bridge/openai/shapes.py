"""How one choice looks in the two endpoints, whole and in chunks."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from pagewire.v1.inference_pb2 import TokenText

from pagewire_bridge.tools.calls import Arguments, Call, Input, Piece, Text, Thought

Choice = dict[str, Any]
Tokens = Sequence[TokenText]
Naming = Callable[[TokenText], str]  # what log probabilities call a token

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Shape(Protocol):
    """What differs between chat and plain completions. tokens is None where no logprobs were asked for."""

    id_prefix: str
    object: str
    chunk_object: str

    def with_prompts(self, response: dict[str, Any], told: Sequence[Any]) -> None:
        """Puts what is told of each prompt into a response that is not streamed."""

    def opening(self, index: int, with_call: bool) -> list[Choice]:
        """Chunks before the first text of a choice, or the call of a tool that it begins with."""

    def delta(self, index: int, piece: Piece, tokens: Tokens | None) -> Choice:
        """A chunk with something new."""

    def ending(self, index: int, finish_reason: str, stop_reason: str | int | None) -> Choice:
        """The last chunk of a choice."""

    def whole(
        self,
        index: int,
        pieces: Sequence[Piece],
        tokens: Tokens | None,
        finish_reason: str,
        stop_reason: str | int | None,
    ) -> Choice:
        """The choice of a response that is not streamed."""


def text_of(token: TokenText) -> str:
    return token.bytes.decode("utf-8", "replace")


def id_of(token: TokenText) -> str:
    """A name that tells tokens apart that print alike: vLLM's."""
    return f"token_id:{token.token_id}"


def logprob_of(token: TokenText) -> float:
    return max(token.logprob, _LEAST_LOGPROB)


def chat_logprobs(tokens: Tokens | None, name: Naming = text_of) -> dict[str, Any] | None:
    """OpenAI's object: `bytes` are exact, so that half a character in a token is not lost."""
    if tokens is None:
        return None

    def told(token: TokenText) -> dict[str, Any]:
        return {"token": name(token), "logprob": logprob_of(token), "bytes": list(token.bytes)}

    content = [{**told(token), "top_logprobs": [told(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


class ChatShape:
    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, echo: str = "", name: Naming = text_of, functions: bool = False) -> None:
        self._echo, self._name, self._functions = echo, name, functions

    def with_prompts(self, response: dict[str, Any], told: Sequence[Any]) -> None:
        [response["prompt_logprobs"]] = told

    def opening(self, index: int, with_call: bool) -> list[Choice]:
        content = None if with_call else ""  # which would begin a text, for clients that show one as it begins
        choices = [_chat_chunk(index, {"role": "assistant", "content": content})]
        return [*choices, _chat_chunk(index, {"content": self._echo})] if self._echo else choices

    def delta(self, index: int, piece: Piece, tokens: Tokens | None) -> Choice:
        delta = chat_delta(piece)
        return _chat_chunk(index, _of_functions(delta) if self._functions else delta, chat_logprobs(tokens, self._name))

    def ending(self, index: int, finish_reason: str, stop_reason: str | int | None) -> Choice:
        return {**_chat_chunk(index, {}), "finish_reason": finish_reason, "stop_reason": stop_reason}

    def whole(
        self,
        index: int,
        pieces: Sequence[Piece],
        tokens: Tokens | None,
        finish_reason: str,
        stop_reason: str | int | None,
    ) -> Choice:
        message = chat_message(pieces)
        if self._echo:
            message["content"] = self._echo + (message["content"] or "")
        return {
            "index": index,
            "message": _of_functions(message) if self._functions else message,
            "logprobs": chat_logprobs(tokens, self._name),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }


def chat_delta(piece: Piece) -> dict[str, Any]:
    """Thoughts have two names: clients are split between them. A call's id, type and name come once."""
    match piece:
        case Thought(text):
            return {"reasoning": text, "reasoning_content": text}
        case Call(index, call_id, name, custom=True):
            given = {"name": name, "input": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "custom", "custom": given}]}
        case Input(index, text):
            return {"tool_calls": [{"index": index, "custom": {"input": text}}]}
        case Call(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return {"content": piece.text}


def chat_message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The whole of what a stream's deltas add up to. Without content beside thoughts or calls it is null."""
    thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Text))
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Call) and piece.custom:
            calls.append({"id": piece.id, "type": "custom", "custom": {"name": piece.name, "input": ""}})
        elif isinstance(piece, Call):
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": piece.id, "type": "function", "function": function})
        elif isinstance(piece, Input):
            calls[piece.index]["custom"]["input"] += piece.text
        elif isinstance(piece, Arguments):
            calls[piece.index]["function"]["arguments"] += piece.text
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if not content and (thoughts or calls):
        message["content"] = None
    if thoughts:
        message |= {"reasoning": thoughts, "reasoning_content": thoughts}
    return message | ({"tool_calls": calls} if calls else {})


def _of_functions(fields: dict[str, Any]) -> dict[str, Any]:
    """A message or a delta, with its only call as it was written before there were tools."""
    calls = fields.pop("tool_calls", None)
    return fields | ({"function_call": calls[0]["function"]} if calls else {})


def _chat_chunk(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class TextOffsets:
    """Where tokens begin in the text of a choice, in characters, though a character may span tokens.

    unseen: leading characters of the tokens that the text lacks, such as those of a beginning of sequence.
    """

    def __init__(self, unseen: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = -unseen

    def extend(self, tokens: Tokens) -> list[int]:
        offsets = []
        for token in tokens:
            offsets.append(max(self._length, 0))
            self._length += len(self._decoder.decode(token.bytes))
        return offsets


def _top_by_name(token: TokenText, name: Naming) -> dict[str, float]:
    """Best first, then the chosen token; of tokens with the same name the best stays."""
    candidates: Iterable[TokenText] = (*token.top, token)
    top: dict[str, float] = {}
    for candidate in candidates:
        top.setdefault(name(candidate), logprob_of(candidate))
    return top


class CompletionShape:
    id_prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, name: Naming = text_of) -> None:
        self._name = name
        self._offsets: dict[int, TextOffsets] = {}

    def with_prompts(self, response: dict[str, Any], told: Sequence[Any]) -> None:
        choices = response["choices"]
        for i, choice in enumerate(choices):
            choice["prompt_logprobs"] = told[i * len(told) // len(choices)]

    def begin(self, index: int, prompt: Tokens, text: str) -> None:
        """A choice begins with its prompt, whose text this is."""
        whole = b"".join(token.bytes for token in prompt).decode("utf-8", "replace")
        self._offsets[index] = TextOffsets(max(len(whole) - len(text), 0))

    def opening(self, index: int, with_call: bool) -> list[Choice]:
        return []

    def delta(self, index: int, piece: Piece, tokens: Tokens | None) -> Choice:
        return self._choice(index, [piece], tokens)

    def _choice(self, index: int, pieces: Sequence[Piece], tokens: Tokens | None) -> Choice:
        text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens), "finish_reason": None}

    def ending(self, index: int, finish_reason: str, stop_reason: str | int | None) -> Choice:
        return {**self._choice(index, (), None), "finish_reason": finish_reason, "stop_reason": stop_reason}

    def whole(
        self,
        index: int,
        pieces: Sequence[Piece],
        tokens: Tokens | None,
        finish_reason: str,
        stop_reason: str | int | None,
    ) -> Choice:
        return {**self._choice(index, pieces, tokens), "finish_reason": finish_reason, "stop_reason": stop_reason}

    def _logprobs(self, index: int, tokens: Tokens | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [logprob_of(token) if token.HasField("logprob") else None for token in tokens],
            "top_logprobs": [
                _top_by_name(token, self._name) if token.HasField("logprob") else None for token in tokens
            ],
            "text_offset": self._offsets.setdefault(index, TextOffsets()).extend(tokens),
        }
