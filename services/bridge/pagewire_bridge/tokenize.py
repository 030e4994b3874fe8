"""/tokenize and its kin. vLLM and TGI share the path: the body says whose request it is."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Annotated, Any

from pagewire.v1 import inference_pb2 as pb
from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.client import client_of
from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.openai.body import ignored_fields, parse_body
from pagewire_bridge.openai.schema import ChatBody
from pagewire_bridge.openai.translate import to_chat
from pagewire_bridge.openai.unsupported import ignored_fields_header, unknown_fields
from pagewire_bridge.responses import json_response

TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class TgiBody(_Body):
    inputs: str
    add_special_tokens: bool | None = None


class PromptBody(_Body):
    """vLLM's, with `prompt`; with `messages` it is a chat's body."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: list[TokenId]


async def tokenize(request: Request) -> Response:
    data = await read_body(request)
    fields = to_object(data)
    if "inputs" in fields:
        body = validated(TgiBody, fields)
        asked = pb.TokenizeRequest(text=body.inputs, add_special_tokens=body.add_special_tokens, with_offsets=True)
        tokens = _simple_tokens(await client_of(request).tokenize(asked))
        return json_response(tokens, headers=ignored_fields_header(unknown_fields(body)))
    if "messages" in fields:
        chat = parse_body(ChatBody, data)
        asked, ignored = of_chat(chat), ignored_fields(chat)
    elif "prompt" in fields:
        prompt = validated(PromptBody, fields)
        ignored = unknown_fields(prompt)
        name = to_served_name(prompt.model)
        asked = pb.TokenizeRequest(model=name, text=prompt.prompt, add_special_tokens=prompt.add_special_tokens)
    else:
        raise InvalidRequest("`prompt`, `messages` or `inputs` is required.", "prompt")
    response = await client_of(request).tokenize(asked)
    strings = _texts(response.tokens) if fields.get("return_token_strs") else None
    return json_response(
        {
            "count": len(response.tokens),
            "max_model_len": response.max_model_len,
            "tokens": [token.id for token in response.tokens],
            "token_strs": strings,
        },
        headers=ignored_fields_header(ignored),
    )


async def chat_tokenize(request: Request) -> Response:
    """TGI's: the tokens of a chat, and the text that the template made of it."""
    chat = parse_body(ChatBody, await read_body(request))
    asked = of_chat(chat)
    asked.with_offsets = True
    response = await client_of(request).tokenize(asked)
    answer = {"tokenize_response": _simple_tokens(response), "templated_text": response.text}
    return json_response(answer, headers=ignored_fields_header(ignored_fields(chat)))


async def detokenize(request: Request) -> Response:
    body = validated(DetokenizeBody, to_object(await read_body(request)))
    asked = pb.DetokenizeRequest(model=to_served_name(body.model), token_ids=body.tokens)
    text = (await client_of(request).detokenize(asked)).text
    return json_response({"prompt": text}, headers=ignored_fields_header(unknown_fields(body)))


async def tokenizer_info(request: Request) -> Response:
    """Only where the operator lets clients see the template."""
    answer = await client_of(request).tokenizer_info(pb.TokenizerInfoRequest())
    return Response(answer.config_json, media_type="application/json")


def of_chat(body: ChatBody) -> pb.TokenizeRequest:
    """For the tokens of a chat. Raises InvalidRequest."""
    if body.truncate_prompt_tokens is not None:
        raise InvalidRequest("`truncate_prompt_tokens` is not for tokenizing.", "truncate_prompt_tokens")
    name, special = to_served_name(body.model), body.add_special_tokens
    return pb.TokenizeRequest(model=name, chat=to_chat(body), add_special_tokens=special)


def _simple_tokens(response: pb.TokenizeResponse) -> list[dict[str, Any]]:
    """TGI's: each token with its piece of the text, and where that begins and stops."""
    text = response.text
    return [{"id": t.id, "text": text[t.begin : t.end], "start": t.begin, "stop": t.end} for t in response.tokens]


def _texts(tokens: Iterable[pb.Token]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(token.bytes) for token in tokens]


TOKENIZER_INFO = Route("/tokenizer_info", tokenizer_info, methods=["GET"])
ROUTES = [
    TOKENIZER_INFO,
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/chat_tokenize", chat_tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
