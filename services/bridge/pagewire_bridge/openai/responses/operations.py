"""The Responses API in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pagewire_core.errors import InvalidRequest, Unavailable

from pagewire_bridge.openai.responses import answer_types as answers
from pagewire_bridge.openai.responses.pages import MAX_PAGE
from pagewire_bridge.openai.responses.routes import cancel, count_input, create, delete, input_items, retrieve
from pagewire_bridge.openai.responses.schema import ResponsesBody
from pagewire_bridge.openapi.headers import IGNORED_FIELDS, PROMPT_TRUNCATED, SERVED_BY
from pagewire_bridge.openapi.operation import ASKING_OF_MODEL, EVENTS, Api, Operation, Raises

_QUESTION: dict[str, Any] = {"input": "What is the capital of Japan?", "max_output_tokens": 24, "temperature": 0}
_TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 16}}},
}
_CALL = {"tools": [_TOOL], "tool_choice": "required", "max_output_tokens": 60}
_TEXT_TOOL: dict[str, Any] = {
    "type": "custom",
    "name": "calculate",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: N (" + " N){1,3}\nN: /[0-9]{1,3}/'},
}
_TEXT_CALL = {"tools": [_TEXT_TOOL], "tool_choice": "required", "max_output_tokens": 60}
_LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
_ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "input_text", "text": "How is the weather in Rome?"}]},
    {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    {"type": "custom_tool_call", "call_id": "call_2", "name": "calculate", "input": "1 + 2"},
    {"type": "custom_tool_call_output", "call_id": "call_2", "output": "3"},
]
PAGES: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "after": {"type": "string"},
}
_STORED: Raises = (InvalidRequest, Unavailable)

API = Api(
    "OpenAI Responses",
    "OpenAI's Responses API: conversations that are stored, and answers that go on in the background.",
    {
        create: Operation(
            "Answers a conversation, whole, as a stream of events, or in the background",
            ResponsesBody,
            answers.ResponseAnswer,
            {EVENTS: answers.Event},
            ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS, PROMPT_TRUNCATED, *SERVED_BY),
            examples={
                "whole": _QUESTION,
                "streamed": {**_QUESTION, "stream": True, **_LOGPROBS},
                "items": {**_QUESTION, "input": _ITEMS, "instructions": "Be kind.", "truncation": "auto"},
                "a call of a function": {**_QUESTION, **_CALL},
                "a call of a function, streamed": {**_QUESTION, **_CALL, "stream": True},
                "a call of a custom tool, which is given a text": {**_QUESTION, **_TEXT_CALL},
                "a call of a custom tool, streamed": {**_QUESTION, **_TEXT_CALL, "stream": True},
                "in the background": {**_QUESTION, "background": True},
                "in the background, streamed": {**_QUESTION, "background": True, "stream": True},
            },
        ),
        count_input: Operation(
            "Counts the tokens that the model would be given for the same body",
            ResponsesBody,
            answers.InputTokens,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={"a question": _QUESTION},
        ),
        retrieve: Operation(
            "A stored response, or the events of one that was streamed in the background",
            answer=answers.ResponseAnswer,
            others={EVENTS: answers.Event},
            raises=_STORED,
            refuses=(404,),
            query={
                "stream": {"type": "string", "enum": ["true", "false"]},
                "starting_after": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
            },
        ),
        delete: Operation("Forgets a response", answer=answers.Deleted, raises=(Unavailable,), refuses=(404,)),
        cancel: Operation(
            "Ends a response in the background", answer=answers.ResponseAnswer, raises=_STORED, refuses=(404,)
        ),
        input_items: Operation(
            "What the model was given for a response, in pages",
            answer=answers.ItemList,
            raises=_STORED,
            refuses=(404,),
            query=PAGES,
        ),
    },
)
