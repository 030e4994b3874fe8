"""POST /generative_scoring, vLLM's: how likely a token is the model's next one after a query and each of many items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pagewire.v1 import common_pb2, inference_pb2
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.blame import blaming
from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.client import RouterClient, client_of
from pagewire_bridge.generation import Generation
from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.openai.answer import usage
from pagewire_bridge.openai.embeddings import head_of
from pagewire_bridge.openai.schema import MAX_LOGPROB_TOKEN_IDS, MAX_PROMPTS, CacheSalt, Priority, RequestId, TokenId
from pagewire_bridge.openai.unsupported import ignored_fields_header, unknown_fields
from pagewire_bridge.respond import begin, name_request, respond
from pagewire_bridge.responses import json_response
from pagewire_bridge.served_by import served_by

_Text = str | list[TokenId]


class ScoringBody(BaseModel):
    """apply_softmax: over the labels alone, or, if false, over the vocabulary. Special tokens are the query's alone."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    query: _Text
    items: Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    label_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LOGPROB_TOKEN_IDS)]
    apply_softmax: bool | None = None
    item_first: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None


async def generative_scoring(request: Request) -> Response:
    body = validated(ScoringBody, to_object(await read_body(request)))
    request_id = name_request(request, body.request_id)
    prompts = await _prompts(client_of(request), body)
    generation = begin(request, [_to_request(body, request_id, prompt) for prompt in prompts], 1)

    async def answer() -> Response:
        scores = await _scores(body, generation)
        content = {
            **head_of(request, "generative-scoring", generation.accepted[0].model),
            "data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)],
            "usage": usage(generation.summaries),
        }
        headers = {**ignored_fields_header(unknown_fields(body)), **served_by(generation.summaries)}
        return json_response(content, headers=headers)

    with blaming({"logprob_token_ids": "label_token_ids", "prompt": "items"}):
        return await respond(request, generation, stream=None, whole=answer)


ROUTES = [Route("/generative_scoring", generative_scoring, methods=["POST"])]


async def _prompts(client: RouterClient, body: ScoringBody) -> list[list[int]]:
    """Query and items make tokens each by itself, as in vLLM: what they have in common is then in the cache."""

    async def tokens(field: str, text: _Text, special: bool | None) -> list[int]:
        if not isinstance(text, str):
            return text
        name = to_served_name(body.model)
        asked = inference_pb2.TokenizeRequest(model=name, text=text, add_special_tokens=special)
        with blaming({"prompt": field}):
            return [token.id for token in (await client.tokenize(asked)).tokens]

    query = await tokens("query", body.query, body.add_special_tokens)
    items = [await tokens(f"items[{i}]", item, False) for i, item in enumerate(body.items)]
    return [item + query if body.item_first else query + item for item in items]


def _to_request(body: ScoringBody, request_id: str, prompt: Sequence[int]) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=to_served_name(body.model),
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=common_pb2.SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=0, logprob_token_ids=body.label_token_ids
        ),
        n=1,
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
    )


async def _scores(body: ScoringBody, generation: Generation) -> list[float]:
    """Of the first label after every item. Raises PagewireError."""
    scores: dict[int, float] = {}
    async for index, delta in generation.deltas():
        for token in delta.tokens:
            scores[index] = _score({label.token_id: label.logprob for label in token.top}, body)
    return [scores[i] for i in range(len(body.items))]


def _score(logprobs: dict[int, float], body: ScoringBody) -> float:
    first = logprobs[body.label_token_ids[0]]
    if body.apply_softmax is False:
        return math.exp(first)
    return 1 / sum(math.exp(other - first) for other in logprobs.values())
