"""Ollama's routes in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pagewire_core.errors import InvalidRequest, ModelNotFound

from pagewire_bridge.ollama import answer_types as answers
from pagewire_bridge.ollama import embed, routes
from pagewire_bridge.ollama.schema import ChatBody, GenerateBody, ModelBody
from pagewire_bridge.openapi.headers import IGNORED_FIELDS, PROMPT_TRUNCATED, SERVED_BY
from pagewire_bridge.openapi.operation import ASKING, ASKING_OF_MODEL, LINES, Api, Operation

_HEADERS = (IGNORED_FIELDS, PROMPT_TRUNCATED, *SERVED_BY)
_OPTIONS = {"temperature": 0, "num_predict": 8}
_MODEL = {"model": "dummy"}  # stands for whatever is served
_PROMPT: dict[str, Any] = {**_MODEL, "prompt": "What is the capital of Japan?", "options": _OPTIONS}
_CHAT: dict[str, Any] = {
    **_MODEL,
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "options": _OPTIONS,
}
_DETAILED = {"logprobs": True, "top_logprobs": 2, "keep_alive": "5m"}

API = Api(
    "Ollama",
    "Ollama's API for the models that are served. Answers are streamed, a line of JSON at a time, unless `stream` is "
    "false. A prompt that does not fit is cut unless `truncate` is false.",
    {
        routes.generate: Operation(
            "Generates text from a prompt",
            GenerateBody,
            answers.GenerateLine,
            {LINES: answers.GenerateEvent},
            ASKING_OF_MODEL,
            headers=_HEADERS,
            examples={
                "streamed": _PROMPT,
                "whole": {**_PROMPT, **_DETAILED, "stream": False},
                "loaded": {**_MODEL, "stream": False},
                "json, raw": {**_PROMPT, "raw": True, "format": "json"},
            },
        ),
        routes.chat: Operation(
            "Answers a chat",
            ChatBody,
            answers.ChatLine,
            {LINES: answers.ChatEvent},
            ASKING_OF_MODEL,
            headers=_HEADERS,
            examples={
                "streamed": {**_CHAT, **_DETAILED},
                "whole": {**_CHAT, "stream": False},
                "unloaded": {**_MODEL, "keep_alive": 0},
            },
        ),
        routes.show: Operation(
            "What is known of a model",
            ModelBody,
            answers.Shown,
            raises=(*ASKING, InvalidRequest, ModelNotFound),
            headers=(IGNORED_FIELDS,),
            examples={"one": _MODEL},
        ),
        routes.tags: Operation("The models that are served", answer=answers.Tags, raises=ASKING),
        routes.ps: Operation("The models that can take requests now", answer=answers.Running, raises=ASKING),
        routes.show_version: Operation("The version whose API this is", answer=answers.Version),
        embed.embed_inputs: Operation(
            "One vector of length 1 for each input",
            embed.EmbedBody,
            answers.EmbedAnswer,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={"two": {**_MODEL, "input": ["Tokyo", "a fox"]}, "none": {**_MODEL, "input": ""}},
        ),
        embed.embed_prompt: Operation(
            "One vector of length 1: the older form",
            embed.EmbeddingsBody,
            answers.EmbeddingsAnswer,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={"one": {**_MODEL, "prompt": "Tokyo"}},
        ),
    },
)
