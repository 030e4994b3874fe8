"""Vectors of texts: OpenAI's embeddings, and vLLM's and Cohere's scores and rankings made of them."""

from __future__ import annotations

import base64
import math
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pagewire.v1 import inference_pb2 as pb
from pagewire_core.errors import InvalidRequest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PlainValidator
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.blame import blaming
from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.client import client_of
from pagewire_bridge.disconnect import until_disconnect
from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.openai.body import read_body_fields
from pagewire_bridge.openai.schema import ChatBody, Message, Prompts, Truncation, num_kept, prompts
from pagewire_bridge.openai.unsupported import ignored_fields_header, unknown_fields
from pagewire_bridge.responses import json_response
from pagewire_bridge.tokenize import of_chat as tokenize_request

Vector = Sequence[float]
MAX_INPUTS = 2048
MAX_DOCUMENTS = 1024
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_DOCUMENTS)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    truncate_prompt_tokens: Truncation = None
    truncation_side: Literal["left", "right"] | None = None

    @property
    def truncation(self) -> dict[str, Any]:
        """Fields of an EmbedRequest: how its inputs are cut."""
        return {
            "truncate_prompt_tokens": num_kept(self.truncate_prompt_tokens),
            "truncate_to_fit": self.truncate_prompt_tokens == -1,
            "keep_last_tokens": self.truncation_side == "left",
        }


class _EmbeddingsBody(_Body):
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class EmbeddingsBody(_EmbeddingsBody):
    input: Annotated[
        list[str | list[int]],
        PlainValidator(lambda value: prompts(value, "input", MAX_INPUTS), json_schema_input_type=Prompts),
    ]


class ChatEmbeddingsBody(_EmbeddingsBody):
    """vLLM's, with `messages`: one input, as the chat template writes it."""

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ScoreBody(_Body):
    """vLLM has several names for either side."""

    text_1: Annotated[str | _Texts, Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))]
    text_2: Annotated[str | _Texts, Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))]


class RerankBody(_Body):
    query: str
    documents: Annotated[list[str | dict[str, Any]], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None


async def embed(
    request: Request, model: str | None, inputs: Sequence[str | list[int]], **truncation: Any
) -> pb.EmbedResponse:
    """The vectors of the inputs, for the tenant of the request. Raises PagewireError.

    truncation: fields of an EmbedRequest.
    """
    asked = pb.EmbedRequest(
        request_id=request.state.request_id,
        model=to_served_name(model),
        inputs=[
            pb.EmbedInput(text=one) if isinstance(one, str) else pb.EmbedInput(token_ids=pb.TokenIds(ids=one))
            for one in inputs
        ],
        tenant=request.state.tenant,
        **truncation,
    )
    response = await until_disconnect(request.receive, client_of(request).embed(asked))
    request.state.charge(response.prompt_tokens)
    return response


async def embeddings(request: Request) -> Response:
    fields = to_object(await read_body(request))
    form: type[EmbeddingsBody | ChatEmbeddingsBody] = ChatEmbeddingsBody if "messages" in fields else EmbeddingsBody
    body = validated(form, fields)
    await check_dimensions(request, body.dimensions)
    if isinstance(body, EmbeddingsBody):
        response = await embed(request, body.model, body.input, **body.truncation)
    else:
        with blaming({"input": "messages"}):
            response = await embed(request, body.model, [await _tokens_of_chat(request, fields)], **body.truncation)
    vectors = [shortened(one.vector, body.dimensions) for one in response.embeddings]
    encode = _base64 if body.encoding_format == "base64" else list
    data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
    return answer_of(body, {**head_of(request, "embd", response.model), "data": data, "usage": _usage(response)})


async def _tokens_of_chat(request: Request, fields: Mapping[str, Any]) -> list[int]:
    """Without a generation prompt unless the client wants one. Raises PagewireError."""
    of_chat = {"model", *ChatEmbeddingsBody.model_fields.keys() - _EmbeddingsBody.model_fields.keys()}
    given = {name: value for name, value in fields.items() if name in of_chat}
    chat = read_body_fields(ChatBody, {"add_generation_prompt": False, **given})
    response = await client_of(request).tokenize(tokenize_request(chat))
    return [token.id for token in response.tokens]


def answer_of(body: BaseModel, content: Mapping[str, object]) -> Response:
    """With the names of the fields that had no effect."""
    return json_response(content, headers=ignored_fields_header(unknown_fields(body)))


async def check_dimensions(request: Request, wanted: int | None) -> None:
    """Raises InvalidRequest for more dimensions than the model's vectors have."""
    if wanted is None:
        return
    most = (await client_of(request).list_models())[0].hidden_size
    if not 1 <= wanted <= most:
        raise InvalidRequest(f"`dimensions` must be between 1 and {most}, the model's own.", "dimensions")


def shortened(vector: Vector, dimensions: int | None) -> Vector:
    """The first numbers of a vector, of length 1 again: what models with Matryoshka representations are trained for."""
    if dimensions is None or dimensions == len(vector):
        return vector
    first = vector[:dimensions]
    length = math.hypot(*first)
    return [value / length for value in first] if length else first


async def score(request: Request) -> Response:
    """vLLM's: the cosine of pairs of texts; one text goes with each of the others."""
    body = validated(ScoreBody, to_object(await read_body(request)))
    first, second = ([text] if isinstance(text, str) else text for text in (body.text_1, body.text_2))
    if len(first) not in (1, len(second)):
        raise InvalidRequest("`text_1` must be one text, or as many as `text_2`.", "text_1")
    response = await embed(request, body.model, [*first, *second], **body.truncation)
    vectors = [one.vector for one in response.embeddings]
    left, right = vectors[: len(first)], vectors[len(first) :]
    scores = [_dot(left[i if len(first) > 1 else 0], vector) for i, vector in enumerate(right)]
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
    return answer_of(body, {**head_of(request, "score", response.model), "data": data, "usage": _usage(response)})


async def rerank(request: Request) -> Response:
    """Documents by their nearness to the query, best first."""
    body = validated(RerankBody, to_object(await read_body(request)))
    texts = [_text(document, i) for i, document in enumerate(body.documents)]
    response = await embed(request, body.model, [body.query, *texts], **body.truncation)
    query, *others = [one.vector for one in response.embeddings]
    scores = {i: _dot(query, vector) for i, vector in enumerate(others)}
    best = sorted(scores, key=lambda i: (-scores[i], i))[: body.top_n or len(scores)]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in best]
    if body.return_documents is not False:
        results = [{**result, "document": {"text": texts[result["index"]]}} for result in results]
    head = {"id": f"rerank-{request.state.request_id}", "model": response.model}
    content = {**head, "usage": {"total_tokens": response.prompt_tokens}, "results": results}
    return answer_of(body, content)


def _text(document: str | dict[str, Any], i: int) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"`documents[{i}]` must be a string or an object with `text`.", f"documents[{i}]")
    return text


def _dot(one: Vector, other: Vector) -> float:
    """Of vectors of length 1, which makes it their cosine."""
    return sum(a * b for a, b in zip(one, other, strict=True))


def _base64(vector: Vector) -> str:
    """float32, little endian: what OpenAI's Python client asks for unless it is told otherwise."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def head_of(request: Request, kind: str, model: str) -> dict[str, object]:
    """Of a list, as vLLM has it, and as Mistral's client wants it."""
    named = {"id": f"{kind}-{request.state.request_id}", "object": "list"}
    return {**named, "created": int(time.time()), "model": model}


def _usage(response: pb.EmbedResponse) -> dict[str, int]:
    return {"prompt_tokens": response.prompt_tokens, "total_tokens": response.prompt_tokens}


ROUTES = [
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    *(Route(path, score, methods=["POST"]) for path in ("/score", "/v1/score")),
    *(Route(path, rerank, methods=["POST"]) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
]
