"""POST /inference/v1/generate, vLLM's: token ids in, token ids out, for clients that have the tokenizer themselves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Annotated, Any, Self

from pagewire.v1.inference_pb2 import Delta, GenerateRequest, TokenIds, TokenText
from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.blame import blaming
from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.generation import Generation
from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.openai.answer import FINISH_REASONS, StreamedUsage, stream, usage
from pagewire_bridge.openai.prompts import listed
from pagewire_bridge.openai.schema import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_LOGPROB_TOKEN_IDS,
    CacheSalt,
    NumLogprobs,
    Priority,
    RequestId,
    Sampling,
    StreamOptions,
    TokenCount,
    TokenId,
    check_min_tokens,
    check_stream_options,
)
from pagewire_bridge.openai.shapes import Choice, chat_logprobs, id_of
from pagewire_bridge.openai.translate import to_sampling
from pagewire_bridge.openai.unsupported import ignored_fields_header, refuse_unsupported_in_tokens, unknown_fields
from pagewire_bridge.respond import begin, name_request, respond
from pagewire_bridge.responses import json_response
from pagewire_bridge.served_by import served_by
from pagewire_bridge.sse import EventStream


class TokenSampling(Sampling):
    """Names and defaults are those of vLLM's SamplingParams."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: TokenCount | None = None
    logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_TOKEN_IDS)] | None = None

    def length_limit(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_min_tokens(self.min_tokens, self.length_limit())
        if self.logprob_token_ids and self.logprobs is None:
            raise InvalidRequest("`logprob_token_ids` needs `logprobs`.", "logprob_token_ids")
        return self


class TokensBody(BaseModel):
    """`model` absent: the only model."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    token_ids: Annotated[list[TokenId], Field(min_length=1)]
    sampling_params: TokenSampling
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: CacheSalt | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_stream_options(self.stream_options, self.stream)
        if self.stream and self.sampling_params.prompt_logprobs is not None:
            raise InvalidRequest("`prompt_logprobs` are not available with `stream: true`.", "prompt_logprobs")
        return self


# Of what is not at the top of the body, as elsewhere, or is the prompt.
_PLACES = {"prompt": "token_ids", **{name: f"sampling_params.{name}" for name in TokenSampling.model_fields}}


async def generate(request: Request) -> Response:
    with blaming(_PLACES):
        fields = to_object(await read_body(request))
        refuse_unsupported_in_tokens(fields)
        body = validated(TokensBody, fields)
        asked = to_request(body, name_request(request, body.request_id))
        generation = begin(request, [asked], asked.n)
        headers = ignored_fields_header(unknown_fields(body))

        async def answer_whole() -> Response:
            answer = await whole(body, asked, generation)
            return json_response(answer, headers={**headers, **served_by(generation.summaries)})

        def answer_stream() -> Response:
            told = StreamedUsage.asked(body.stream_options, request.state.always_usage)
            return EventStream(_events(asked, generation, told), generation.close, headers)

        return await respond(request, generation, stream=answer_stream if body.stream else None, whole=answer_whole)


ROUTES = [Route("/inference/v1/generate", generate, methods=["POST"])]


def to_request(body: TokensBody, request_id: str) -> GenerateRequest:
    sampling = body.sampling_params
    form = sampling.structured_outputs
    return GenerateRequest(
        request_id=request_id,
        model=to_served_name(body.model),
        token_ids=TokenIds(ids=body.token_ids),
        sampling=to_sampling(sampling, sampling.length_limit(), sampling.logprobs, sampling.logprob_token_ids),
        n=sampling.n or 1,
        cache_salt=body.cache_salt or "",
        structured_output=form.to_proto() if form is not None else None,
        priority=body.priority or 0,
        prompt_logprobs=sampling.prompt_logprobs,
        model_sampling_defaults=True,
    )


def _choice(index: int, tokens: Sequence[TokenText], finish_reason: str | None, logprobs: bool) -> Choice:
    return {
        "index": index,
        "logprobs": chat_logprobs(tokens, id_of) if logprobs else None,
        "finish_reason": finish_reason,
        "token_ids": [token.token_id for token in tokens],
    }


def _finish_reason(delta: Delta) -> str | None:
    return FINISH_REASONS.get(delta.finish_reason)


def _events(asked: GenerateRequest, generation: Generation, told: StreamedUsage) -> AsyncGenerator[bytes]:
    logprobs = asked.sampling.HasField("logprobs")

    def choices(index: int, delta: Delta) -> Iterator[Choice]:
        if delta.tokens or delta.finish_reason:
            yield _choice(index, delta.tokens, _finish_reason(delta), logprobs)

    return stream({"request_id": asked.request_id, "usage": None}, choices, usage, generation, told)


async def whole(body: TokensBody, asked: GenerateRequest, generation: Generation) -> dict[str, Any]:
    """The response object. Raises PagewireError."""
    tokens: list[list[TokenText]] = [[] for _ in range(asked.n)]
    reasons: list[str | None] = [None] * asked.n
    async for index, delta in generation.deltas():
        tokens[index].extend(delta.tokens)
        reasons[index] = _finish_reason(delta) or reasons[index]
    num_best, logprobs = body.sampling_params.prompt_logprobs, asked.sampling.HasField("logprobs")
    return {
        "request_id": asked.request_id,
        "choices": [_choice(i, *told, logprobs) for i, told in enumerate(zip(tokens, reasons, strict=True))],
        "prompt_logprobs": None if num_best is None else listed(generation.prompt_tokens[0], num_best),
        "kv_transfer_params": None,
        "usage": usage(generation.summaries),
    }
