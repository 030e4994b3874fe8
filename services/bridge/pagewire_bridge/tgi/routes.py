"""TGI's native routes, and those of the platforms that TGI serves: SageMaker, Vertex AI, KServe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain, repeat
from typing import Any

from pagewire.v1.inference_pb2 import Model, Summary
from pagewire_core.errors import InvalidRequest, Unavailable
from pagewire_core.tasks import all_of
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.body import read_body, to_object, validated
from pagewire_bridge.client import client_of
from pagewire_bridge.disconnect import until_disconnect
from pagewire_bridge.openai.body import read_body_fields
from pagewire_bridge.openai.routes import answer_chat, answer_completion
from pagewire_bridge.openai.schema import ChatBody
from pagewire_bridge.openai.translate import to_chat_request
from pagewire_bridge.openai.unsupported import ignored_fields_header, unknown_fields
from pagewire_bridge.respond import begin, respond
from pagewire_bridge.responses import json_response
from pagewire_bridge.served_by import served_by
from pagewire_bridge.sse import EventStream
from pagewire_bridge.tgi.answer import Asked, stream, whole
from pagewire_bridge.tgi.schema import MAX_BEST_OF, MAX_STOP_SEQUENCES, GenerateBody, InferBody, InferOutput, VertexBody
from pagewire_bridge.tgi.translate import to_request

MAX_CLIENT_BATCH_SIZE = 4
_JUST_TEXT = Asked(inputs="", full_text=False, details=False, with_top_tokens=False, samples=False)


async def generate(request: Request) -> Response:
    return await _answer(request, validated(GenerateBody, to_object(await read_body(request))), streams=False)


async def generate_stream(request: Request) -> Response:
    return await _answer(request, validated(GenerateBody, to_object(await read_body(request))), streams=True)


async def generate_either(request: Request) -> Response:
    """POST /: streams when the body says so."""
    body = validated(GenerateBody, to_object(await read_body(request)))
    return await _answer(request, body, streams=bool(body.stream), older=True)


async def invocations(request: Request) -> Response:
    """SageMaker's one route, for every API: the body tells which is meant."""
    data = await read_body(request)
    fields = to_object(data)
    if "inputs" in fields:
        body = validated(GenerateBody, fields)
        return await _answer(request, body, streams=bool(body.stream), older=True)
    return await (answer_chat(request, data) if "messages" in fields else answer_completion(request, data))


async def vertex(request: Request) -> Response:
    """{"instances": [...]} -> {"predictions": [text, ...]}; all of them run at once. An instance may be a chat."""
    body = validated(VertexBody, to_object(await read_body(request)))
    if len(body.instances) > MAX_CLIENT_BATCH_SIZE:
        raise InvalidRequest(f"`instances` may hold at most {MAX_CLIENT_BATCH_SIZE}", "instances")
    bodies = [_instance(fields) for fields in body.instances]
    texts = await until_disconnect(request.receive, _texts(request, bodies))
    names = unknown_fields(body) + [name for one in bodies for name in unknown_fields(one, "instances.")]
    return json_response({"predictions": texts}, headers=ignored_fields_header(names))


def _instance(fields: dict[str, Any]) -> GenerateBody | ChatBody:
    if "messages" not in fields:
        return validated(GenerateBody, fields)
    chat = read_body_fields(ChatBody, fields)
    if (chat.n or 1) > 1:
        raise InvalidRequest("`n` must be 1 here: an instance has one prediction", "n")
    return chat


async def info(request: Request) -> Response:
    model = await _model(request)
    return json_response(
        {
            "model_id": model.root,
            "model_sha": model.digest.hex(),
            "model_dtype": model.dtype,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": model.max_concurrent_requests,
            "max_best_of": MAX_BEST_OF,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_input_tokens": model.max_model_len - 1,
            "max_total_tokens": model.max_model_len,
            "max_batch_total_tokens": model.kv_tokens,
            "validation_workers": 1,
            "max_client_batch_size": MAX_CLIENT_BATCH_SIZE,
            "router": "pagewire",
            "version": version("pagewire"),
            "sha": None,
            "docker_label": None,
        }
    )


async def kserve_server(request: Request) -> Response:
    return json_response({"name": "pagewire", "version": version("pagewire"), "extensions": []})


async def kserve_live(request: Request) -> Response:
    return json_response({"live": True})


async def kserve_ready(request: Request) -> Response:
    ready = await client_of(request).is_serving()
    return json_response({"live": ready, "ready": ready}, 200 if ready else 503)


async def kserve_model(request: Request) -> Response:
    model = await _model(request)
    tensor = {"datatype": "BYTES", "shape": [1]}
    return json_response(
        {
            "name": request.path_params["model"],
            "versions": [request.path_params.get("version", "1")],
            "platform": f"pagewire-{model.architecture}",
            "inputs": [{"name": "text_input", **tensor}],
            "outputs": [{"name": "text_output", **tensor}],
        }
    )


async def kserve_infer(request: Request) -> Response:
    body = validated(InferBody, to_object(await read_body(request)))
    if body.outputs and len(body.outputs) > len(body.inputs):
        raise InvalidRequest("there are more `outputs` than `inputs`", "outputs")
    prompts = [_to_text(one.data, f"inputs[{i}].data") for i, one in enumerate(body.inputs)]
    bodies = [GenerateBody(inputs=prompt, parameters=body.parameters) for prompt in prompts]
    texts = await until_disconnect(request.receive, _texts(request, bodies))
    outputs = []
    wanted = chain(body.outputs or (), repeat(InferOutput()))
    for given, text, output in zip(body.inputs, texts, wanted, strict=False):
        as_bytes = isinstance(given.data[0], int)  # TGI's own form; the protocol's is a string
        data: list[Any] = list(text.encode()) if as_bytes else [text]
        outputs.append({"name": output.name, "shape": [1, len(data)], "datatype": "BYTES", "data": data})
    answer = {"id": body.id or request.state.request_id, "outputs": outputs}
    return json_response(answer, headers=ignored_fields_header(unknown_fields(body)))


def _to_text(data: Sequence[str] | Sequence[int], where: str) -> str:
    try:
        text = "".join(data) if data and isinstance(data[0], str) else bytes(data).decode()  # type: ignore[arg-type]
    except ValueError:
        raise InvalidRequest(f"`{where}` must be a string, or bytes of UTF-8 text", where) from None
    if not text:
        raise InvalidRequest(f"`{where}` must not be empty", where)
    return text


async def _answer(request: Request, body: GenerateBody, *, streams: bool, older: bool = False) -> Response:
    """older: as Hugging Face's API was before TGI: a whole answer is in a list, and unless the client says otherwise a
    text begins with its prompt.
    """
    parameters, began = body.asked, time.perf_counter()
    if streams and (parameters.best_of or 1) > 1:
        raise InvalidRequest("`best_of` must be 1 where the answer is streamed", "best_of")
    if streams and parameters.decoder_input_details:
        raise InvalidRequest("`decoder_input_details` is not supported when streaming tokens", "decoder_input_details")
    asked = to_request(body, request.state.request_id, with_tokens=streams)
    generation = begin(request, [asked], asked.n)
    about, ignored = _about(body, full_text=older), ignored_fields_header(unknown_fields(body))

    async def answer_whole() -> Response:
        content = await whole(about, generation, asked.n)
        timings = _timings(body.inputs, generation.summaries[0], time.perf_counter() - began)
        headers = {**ignored, **timings, **served_by(generation.summaries)}
        return json_response([content] if older else content, headers=headers)

    def answer_stream() -> Response:
        return EventStream(stream(about, generation), generation.close, ignored)

    return await respond(request, generation, stream=answer_stream if streams else None, whole=answer_whole)


async def _texts(request: Request, bodies: Sequence[GenerateBody | ChatBody]) -> list[str]:
    """The generated texts, in order; the first failure ends all."""
    ids = [f"{request.state.request_id}-{i}" for i in range(len(bodies))]
    return await all_of(_text(request, *each) for each in zip(bodies, ids, strict=True))


async def _text(request: Request, body: GenerateBody | ChatBody, request_id: str) -> str:
    if isinstance(body, ChatBody):
        asked, about = to_chat_request(body, request_id), _JUST_TEXT
    else:
        asked = to_request(body, request_id, with_tokens=False)
        about = _about(body, full_text=False)
    generation = begin(request, [asked], asked.n)
    try:
        await generation.open()
        content = await whole(about, generation, asked.n)
    finally:
        await generation.close()
    return str(content["generated_text"])


def _about(body: GenerateBody, *, full_text: bool) -> Asked:
    """full_text: where the client does not say."""
    parameters = body.asked
    return Asked(
        inputs=body.inputs,
        full_text=full_text if parameters.return_full_text is None else parameters.return_full_text,
        details=bool(parameters.details),
        with_top_tokens=bool(parameters.top_n_tokens),
        samples=parameters.samples,
    )


def _timings(inputs: str, summary: Summary, seconds: float) -> dict[str, str]:
    """TGI's headers: milliseconds, but for x-compute-time, which is in seconds."""
    inference_us = summary.total_us - summary.timings.queue_us
    milliseconds = {
        "x-total-time": seconds * 1e3,
        "x-validation-time": max(seconds * 1e3 - summary.total_us / 1e3, 0.0),
        "x-queue-time": summary.timings.queue_us / 1e3,
        "x-inference-time": inference_us / 1e3,
        "x-time-per-token": inference_us / 1e3 / max(summary.completion_tokens, 1),
    }
    return {
        "x-compute-type": "pagewire",
        "x-compute-time": f"{seconds:.6f}",
        "x-compute-characters": str(len(inputs)),
        **{name: str(round(value)) for name, value in milliseconds.items()},
        "x-prompt-tokens": str(summary.prompt_tokens),
        "x-generated-tokens": str(summary.completion_tokens),
    }


async def _model(request: Request) -> Model:
    models = await client_of(request).list_models()
    if not models:
        raise Unavailable("no model is served")
    return models[0]


ROUTES = [
    Route("/", generate_either, methods=["POST"]),
    Route("/generate", generate, methods=["POST"]),
    Route("/generate_stream", generate_stream, methods=["POST"]),
    Route("/invocations", invocations, methods=["POST"]),
    Route("/vertex", vertex, methods=["POST"]),
    Route("/info", info, methods=["GET"]),
    Route("/v2", kserve_server, methods=["GET"]),
    Route("/v2/health/live", kserve_live, methods=["GET"]),
    Route("/v2/health/ready", kserve_ready, methods=["GET"]),
    Route("/v2/models/{model}/versions/{version}/infer", kserve_infer, methods=["POST"]),
    Route("/v2/models/{model}/versions/{version}/ready", kserve_ready, methods=["GET"]),
    Route("/v2/models/{model}/versions/{version}", kserve_model, methods=["GET"]),
    Route("/v2/models/{model}/infer", kserve_infer, methods=["POST"]),
    Route("/v2/models/{model}/ready", kserve_ready, methods=["GET"]),
    Route("/v2/models/{model}", kserve_model, methods=["GET"]),
]
