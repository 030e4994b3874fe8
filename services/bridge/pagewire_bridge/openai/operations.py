"""The OpenAI endpoints in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pagewire_core.errors import ModelNotFound

from pagewire_bridge.openai import answer_types as answers
from pagewire_bridge.openai.embeddings import (
    ChatEmbeddingsBody,
    EmbeddingsBody,
    RerankBody,
    ScoreBody,
    embeddings,
    rerank,
    score,
)
from pagewire_bridge.openai.generative_scoring import ScoringBody, generative_scoring
from pagewire_bridge.openai.routes import chat_completions, completions, list_models, retrieve_model
from pagewire_bridge.openai.schema import ChatBody, CompletionBody
from pagewire_bridge.openapi.headers import IGNORED_FIELDS, SERVED_BY
from pagewire_bridge.openapi.operation import ASKING, ASKING_OF_MODEL, EVENTS, Api, Operation

_QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "max_tokens": 24,
    "temperature": 0,
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 16}}},
    },
}
_TEXT_TOOL: dict[str, Any] = {
    "type": "custom",
    "custom": {
        "name": "calculate",
        "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[0-9]{1,3} [+*] [0-9]{1,3}"}},
    },
}
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_COUNTED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_DETAILED = {"n": 2, "return_token_ids": True, "service_tier": "auto"}
_CALL = {"tools": [_TOOL], "tool_choice": "required", "max_tokens": 60}
_TEXT_CALL = {"tools": [_TEXT_TOOL], "tool_choice": "required", "max_tokens": 60}
_FUNCTION = {"functions": [_TOOL["function"]], "function_call": {"name": "get_weather"}, "max_tokens": 60}
_FORM = {"structured_outputs": {"choice": ["yes", "no"]}}

CHAT_EXAMPLES: dict[str, dict[str, Any]] = {
    "whole": _QUESTION,
    "streamed": {**_QUESTION, **_STREAMED},
    "detailed": {**_QUESTION, **_DETAILED, "logprobs": True, "top_logprobs": 2},
    "detailed and streamed": {**_QUESTION, **_COUNTED, **_DETAILED, "logprobs": True},
    "a call of a tool": {**_QUESTION, **_CALL},
    "a call of a tool, streamed": {**_QUESTION, **_CALL, **_STREAMED},
    "a call of a custom tool, which is given a text": {**_QUESTION, **_TEXT_CALL},
    "a call of a custom tool, streamed": {**_QUESTION, **_TEXT_CALL, **_STREAMED},
    "a call of a function, as before there were tools": {**_QUESTION, **_FUNCTION},
    "a call of a function, streamed": {**_QUESTION, **_FUNCTION, **_STREAMED},
    "a form": {**_QUESTION, **_FORM},
}
COMPLETION_EXAMPLES: dict[str, dict[str, Any]] = {
    "whole": {"prompt": "Once upon a time", "max_tokens": 8},
    "streamed": {"prompt": "Once upon a time", "max_tokens": 8, **_COUNTED},
    "detailed": {"prompt": ["Once", "Twice"], "max_tokens": 4, **_DETAILED, "logprobs": 2},
    "beam search": {"prompt": "Once upon a time", "max_tokens": 4, "use_beam_search": True, "n": 2},
    "token ids": {"prompt": [5, 6, 7], "max_tokens": 4, "stream": True, "logprobs": 0, "return_token_ids": True},
}
_TEXTS = ["Tokyo is a city.", "A fox is an animal."]

API = Api(
    "OpenAI",
    "OpenAI's API, with vLLM's extra parameters. Fields that have no effect are named in a response header; those that "
    "ask for what is not supported are refused by name.",
    {
        chat_completions: Operation(
            "Answers a chat, whole or as a stream of events",
            ChatBody,
            answers.ChatAnswer,
            {EVENTS: answers.ChatEvent},
            ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS, *SERVED_BY),
            examples=CHAT_EXAMPLES,
        ),
        completions: Operation(
            "Continues prompts, whole or as a stream of events",
            CompletionBody,
            answers.CompletionAnswer,
            {EVENTS: answers.CompletionEvent},
            ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS, *SERVED_BY),
            examples=COMPLETION_EXAMPLES,
        ),
        embeddings: Operation(
            "One vector of length 1 for each input, or with vLLM's `messages` for a chat",
            EmbeddingsBody | ChatEmbeddingsBody,
            answers.EmbeddingList,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={
                "floats": {"input": _TEXTS},
                "base64": {"input": "Tokyo", "encoding_format": "base64"},
                "token ids": {"input": [[5, 6], [7]]},
                "a chat": {"messages": [{"role": "user", "content": "hi"}]},
            },
        ),
        score: Operation(
            "How near texts are to each other, by the cosine of their vectors",
            ScoreBody,
            answers.ScoreList,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={"one with each": {"text_1": "Tokyo", "text_2": _TEXTS}},
        ),
        rerank: Operation(
            "Documents by their nearness to a query",
            RerankBody,
            answers.Ranking,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={
                "all": {"query": "Tokyo", "documents": _TEXTS},
                "the best, without its text": {
                    "query": "Tokyo",
                    "documents": [{"text": text} for text in _TEXTS],
                    "top_n": 1,
                    "return_documents": False,
                },
            },
        ),
        generative_scoring: Operation(
            "How likely a token is the model's next one after a query and each of many items",
            ScoringBody,
            answers.GenerativeScoreList,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS, *SERVED_BY),
            examples={
                "texts": {"query": "Is this a city?", "items": _TEXTS, "label_token_ids": [5, 6]},
                "token ids": {"query": [5, 6], "items": [[7], [8]], "label_token_ids": [9], "apply_softmax": False},
            },
        ),
        list_models: Operation("The models that are served", answer=answers.ModelList, raises=ASKING),
        retrieve_model: Operation("One model", answer=answers.Model, raises=(*ASKING, ModelNotFound)),
    },
)
