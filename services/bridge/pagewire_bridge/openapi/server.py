"""The routes that are no API's in the OpenAPI document: tokens, health, administration, pages."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from pagewire_bridge import chat_page, server, token_generation, tokenize
from pagewire_bridge.openai import answer_types as answers
from pagewire_bridge.openai.schema import ChatBody
from pagewire_bridge.openapi import routes
from pagewire_bridge.openapi.errors import TGIError
from pagewire_bridge.openapi.headers import IGNORED_FIELDS, SERVED_BY
from pagewire_bridge.openapi.operation import ASKING, ASKING_OF_MODEL, EVENTS, JSON, Api, Operation
from pagewire_bridge.tgi.answer_types import SimpleToken


class Tokens(TypedDict):
    """token_strs: null unless `return_token_strs` asks for it."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(TypedDict):
    prompt: str


class TokenizerInfo(BaseModel):
    """With everything else that is in the model's tokenizer_config.json."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | None


class Load(TypedDict):
    server_load: int


class ServerInfo(TypedDict):
    """Flags as they are typed, by name, without secrets; workers' by worker id."""

    version: str
    bridge: dict[str, str]
    router: dict[str, str]
    workers: dict[str, dict[str, str]]


class Version(TypedDict):
    version: str


_HTML = "text/html"

API = Api(
    "Server",
    "vLLM's routes beside OpenAI's, health, administration, and pages.",
    {
        token_generation.generate: Operation(
            "Continues token ids by token ids, whole or as a stream of events: vLLM's route for clients that have the "
            "tokenizer themselves",
            token_generation.TokensBody,
            answers.TokensAnswer,
            {EVENTS: answers.TokensEvent},
            ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS, *SERVED_BY),
            examples={
                "whole": {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}},
                "detailed": {
                    "token_ids": [5, 6, 7],
                    "sampling_params": {"max_tokens": 4, "n": 2, "seed": 1, "logprobs": 2, "prompt_logprobs": 1},
                },
                "streamed": {
                    "token_ids": [5, 6, 7],
                    "sampling_params": {"max_tokens": 4, "logprobs": 0},
                    "stream": True,
                    "stream_options": {"include_usage": True},
                },
            },
        ),
        tokenize.tokenize: Operation(
            "A prompt as tokens: `prompt` or `messages` means vLLM's form, `inputs` TGI's, which is answered by a list",
            tokenize.PromptBody | ChatBody | tokenize.TgiBody,
            Tokens | list[SimpleToken],
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={
                "vLLM: a prompt": {"prompt": "Tokyo", "return_token_strs": True},
                "vLLM: a chat": {"messages": [{"role": "user", "content": "hi"}]},
                "TGI": {"inputs": "Tokyo"},
            },
        ),
        tokenize.detokenize: Operation(
            "Tokens as text",
            tokenize.DetokenizeBody,
            Prompt,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={"some": {"tokens": [5, 6, 7]}},
        ),
        tokenize.tokenizer_info: Operation(
            "The settings of the tokenizer, with the chat template that is served",
            answer=TokenizerInfo,
            raises=ASKING,
        ),
        server.health: Operation("Without a body: requests can be served", statuses={503: TGIError}),
        server.load: Operation("How many requests are in flight", answer=Load),
        server.reset_prefix_cache: Operation("The workers forget cached blocks that nobody uses", raises=ASKING),
        server.server_info: Operation(
            "The flags that bridge, router and workers were started with", answer=ServerInfo, raises=ASKING
        ),
        server.show_version: Operation("The version of this server", answer=Version),
        server.metrics: Operation(
            "Prometheus metrics of the bridge, the router and its workers", others={"text/plain": str}
        ),
        chat_page.root: Operation(
            "The chat page for who accepts text/html, Ollama's banner for others",
            others={_HTML: str, "text/plain": str},
        ),
        chat_page.file: Operation(
            "The files of the chat page",
            others={_HTML: str, "text/css": str, "text/javascript": str},
            refuses=(404,),
            path_values={"name": tuple(sorted(chat_page.FILES))},
        ),
        routes.openapi: Operation("This document", others={JSON: dict[str, object]}),
        routes.docs: Operation("This document as a page (Swagger UI)", others={_HTML: str}),
        routes.docs_file: Operation(
            "The files of that page",
            others={"text/css": str, "text/javascript": str},
            refuses=(404,),
            path_values={"name": tuple(sorted(routes.FILES))},
        ),
    },
)
