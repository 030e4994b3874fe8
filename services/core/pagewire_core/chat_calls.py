"""Calls of tools in the forms that templates want them in which refuse OpenAI's."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pagewire_core.chat_roles import Message

Call = Mapping[str, Any]
_ID_LENGTH = 9  # in Mistral's templates


def call_forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The chat with its calls as they are, and then, if there are any, told in other ways; none loses a word.

    1. As they are: with any ids or none, arguments as an object, results without a name.
    2. Ids are nine letters and digits, as for Mistral's templates; results name their tool, as for Hermes 2 Pro's.
    3. Arguments are JSON text, too, as for DeepSeek R1's.
    """
    yield messages
    if any(map(_calls, messages)):
        told = list(_with_short_ids(_with_names(_with_ids(messages))))
        yield told
        yield [_with_calls(message, _as_text) for message in told]


def _calls(message: Message) -> Sequence[Call]:
    return message.get("tool_calls") or ()


def _with_calls(message: Message, change: Callable[[Call], Call]) -> Message:
    calls = _calls(message)
    return {**message, "tool_calls": [change(call) for call in calls]} if calls else message


def _with_ids(messages: Sequence[Message]) -> Iterator[Message]:
    """Ollama's clients know none: results come in the order of their calls."""
    unanswered: deque[str] = deque()
    for i, message in enumerate(messages):
        if calls := _calls(message):
            named = [{**call, "id": call.get("id") or f"call{i}x{j}"} for j, call in enumerate(calls)]
            unanswered = deque(call["id"] for call in named)
            yield {**message, "tool_calls": named}
        elif message["role"] == "tool" and unanswered:
            yield {"tool_call_id": unanswered.popleft(), **message}
        else:
            yield message


def _with_names(messages: Iterator[Message]) -> Iterator[Message]:
    names: dict[str, str] = {}
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in _calls(message)}
        answered = names.get(message.get("tool_call_id", ""))
        yield {"name": answered, **message} if answered else message


def _with_short_ids(messages: Iterator[Message]) -> Iterator[Message]:
    for message in messages:
        if call_id := message.get("tool_call_id"):
            yield {**message, "tool_call_id": _short(call_id)}
        else:
            yield _with_calls(message, lambda call: {**call, "id": _short(call["id"])})


def _short(call_id: str) -> str:
    """The same of the same id; an id of that length as it is."""
    return "".join(c for c in call_id if c.isascii() and c.isalnum())[-_ID_LENGTH:].rjust(_ID_LENGTH, "0")


def _as_text(call: Call) -> Call:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
