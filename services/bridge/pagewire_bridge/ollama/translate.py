"""Ollama's requests as GenerateRequests, with Ollama's defaults: pure functions."""

from __future__ import annotations

from collections.abc import Iterable

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest

from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.ollama.schema import ChatBody, GenerateBody, Options

_TEMPERATURE, _TOP_P, _TOP_K = 0.8, 0.9, 40
_WHOLE_CONTEXT = -1  # repeat_last_n: what our repetition penalty always covers


def to_model(name: str) -> str:
    """Clients name a model with a tag; the default one says nothing."""
    return to_served_name(name.removesuffix(":latest"))


def to_sampling(options: Options, logprobs: int | None) -> common_pb2.SamplingParams:
    seed = options.seed if options.seed is not None and options.seed >= 0 else None  # negative: a new one each time
    return common_pb2.SamplingParams(
        temperature=_TEMPERATURE if options.temperature is None else options.temperature,
        top_p=_TOP_P if options.top_p is None else options.top_p,
        top_k=_TOP_K if options.top_k is None else options.top_k,
        min_p=options.min_p or 0.0,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        seed=seed,
        stop=options.stop or (),
        max_tokens=max(options.num_predict or 0, 0),
        logprobs=logprobs,
    )


def to_generate_request(body: GenerateBody, request_id: str) -> inference_pb2.GenerateRequest:
    """The prompt is a user's message, unless it is raw. Raises InvalidRequest."""
    _refuse(body, ("suffix", "template", "images"))
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        model=to_model(body.model),
        sampling=to_sampling(body.asked, _logprobs(body)),
        return_prompt_token_ids=not body.raw,
    )
    if body.raw:
        if body.system or body.context:
            raise InvalidRequest("raw mode does not support system or context", "raw")
        request.text = body.prompt or ""
        return request
    if body.system:
        request.chat.messages.add(role="system", content=body.system)
    request.chat.messages.add(role="user", content=body.prompt or "")
    return request


def to_chat_request(body: ChatBody, request_id: str) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest."""
    _refuse(body, ("tools",))
    if any(message.images for message in body.messages or ()):
        raise InvalidRequest("images are not supported yet", "images")
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=to_model(body.model),
        chat=inference_pb2.Chat(
            messages=[
                inference_pb2.ChatMessage(role=message.role, content=message.content or "")
                for message in body.messages or ()
            ]
        ),
        sampling=to_sampling(body.asked, _logprobs(body)),
    )


def ignored(body: GenerateBody | ChatBody) -> list[str]:
    """Names of what has no effect: the model stays loaded, and its context is what it is."""
    names = list(body.model_extra or ())
    names += [f"options.{name}" for name in body.asked.model_extra or ()]
    if body.keep_alive is not None:
        names.append("keep_alive")
    if body.shift:
        names.append("shift")
    if (body.asked.repeat_penalty or 1.0) != 1.0 and body.asked.repeat_last_n not in (None, _WHOLE_CONTEXT):
        names.append("options.repeat_last_n")
    return names


def _logprobs(body: GenerateBody | ChatBody) -> int | None:
    return (body.top_logprobs or 0) if body.logprobs else None


def _refuse(body: GenerateBody | ChatBody, names: Iterable[str]) -> None:
    if (body.asked.typical_p or 1.0) < 1.0:
        raise InvalidRequest("options.typical_p is not supported yet", "options.typical_p")
    if body.think:
        raise InvalidRequest(f'"{body.model}" does not support thinking', "think")
    for name in (*names, "format"):
        if getattr(body, name, None):
            raise InvalidRequest(f"{name} is not supported yet", name)
