"""The Messages API in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pagewire_bridge.anthropic import answer_types as answers
from pagewire_bridge.anthropic.routes import count_tokens, messages
from pagewire_bridge.anthropic.schema import CountBody, MessagesBody
from pagewire_bridge.openapi.headers import ANTHROPIC_ID, IGNORED_FIELDS, SERVED_BY
from pagewire_bridge.openapi.operation import ASKING_OF_MODEL, EVENTS, Api, Operation

_PROMPT: dict[str, Any] = {
    "model": "dummy",  # stands for whatever is served
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
}
_QUESTION: dict[str, Any] = {**_PROMPT, "max_tokens": 24, "temperature": 0}
_TOOL = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 16}}},
}
_CALL = {"tools": [_TOOL], "tool_choice": {"type": "any"}, "max_tokens": 60}

API = Api(
    "Anthropic",
    "Anthropic's Messages API.",
    {
        messages: Operation(
            "Answers a chat, whole or as a stream of events",
            MessagesBody,
            answers.MessageAnswer,
            {EVENTS: answers.Event},
            ASKING_OF_MODEL,
            headers=(ANTHROPIC_ID, IGNORED_FIELDS, *SERVED_BY),
            examples={
                "whole": _QUESTION,
                "streamed": {**_QUESTION, "stream": True, "stop_sequences": ["Tokyo"]},
                "a call of a tool": {**_QUESTION, **_CALL},
                "a call of a tool, streamed": {**_QUESTION, **_CALL, "stream": True},
            },
        ),
        count_tokens: Operation(
            "How many tokens a prompt has",
            CountBody,
            answers.TokenCount,
            raises=ASKING_OF_MODEL,
            headers=(ANTHROPIC_ID, IGNORED_FIELDS),
            examples={"a question": _PROMPT},
        ),
    },
)
