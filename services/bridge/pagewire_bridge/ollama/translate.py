"""Ollama's requests as GenerateRequests, with Ollama's defaults: pure functions."""

from __future__ import annotations

from typing import Any

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest

from pagewire_bridge.answer_parser import AnswerFormat
from pagewire_bridge.body import validated
from pagewire_bridge.json_text import written
from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.ollama.schema import CalledTool, ChatBody, GenerateBody, Message, Options
from pagewire_bridge.openai.schema import ChatBody as OpenAIChat
from pagewire_bridge.openai.structured import ResponseFormat
from pagewire_bridge.openai.translate import to_chat_request
from pagewire_bridge.openai.unsupported import unknown_fields

_TEMPERATURE, _TOP_P, _TOP_K = 0.8, 0.9, 40
_REPEAT_LAST_N = 64
_EVERYTHING = 2**32 - 1  # tokens: more than any context has


def to_model(name: str) -> str:
    """Clients name a model with a tag; the default one says nothing."""
    return to_served_name(name.removesuffix(":latest"))


def to_sampling(options: Options, logprobs: int | None) -> common_pb2.SamplingParams:
    window = _REPEAT_LAST_N if options.repeat_last_n is None else options.repeat_last_n  # negative: the whole context
    penalised = options if window else Options()  # of no tokens there is none
    seed = options.seed if options.seed is not None and options.seed >= 0 else None  # negative: a new one each time
    return common_pb2.SamplingParams(
        temperature=_TEMPERATURE if options.temperature is None else options.temperature,
        top_p=_TOP_P if options.top_p is None else options.top_p,
        top_k=_TOP_K if options.top_k is None else options.top_k,
        typical_p=options.typical_p if 0 < (options.typical_p or 1.0) < 1 else None,
        min_p=options.min_p or 0.0,
        repetition_penalty=penalised.repeat_penalty,
        presence_penalty=penalised.presence_penalty or 0.0,
        frequency_penalty=penalised.frequency_penalty or 0.0,
        penalty_window=_window(penalised, window),
        seed=seed,
        stop=options.stop or (),
        max_tokens=options.num_predict or 0,
        logprobs=logprobs,
    )


def _window(penalised: Options, asked: int) -> int:
    """0, which every worker knows, unless there is a penalty that it is for."""
    if (penalised.repeat_penalty or 1.0) == 1.0 and not penalised.presence_penalty and not penalised.frequency_penalty:
        return 0
    return asked if asked > 0 else _EVERYTHING


def to_generate_request(body: GenerateBody, request_id: str, answers: AnswerFormat) -> inference_pb2.GenerateRequest:
    """The prompt is a user's message, unless it is raw. Raises InvalidRequest."""
    for name in ("suffix", "template", "images"):
        if getattr(body, name):
            raise InvalidRequest(f"{name} is not supported yet", name)
    if not body.raw:
        return _complete(to_chat_request(as_chat(body, answers), request_id, answers), body)
    if body.system or body.context:
        raise InvalidRequest("raw mode does not support system or context", "raw")
    request = inference_pb2.GenerateRequest(request_id=request_id, model=to_model(body.model), text=body.prompt or "")
    if form := _form(body.format):
        request.structured_output.CopyFrom(form)
    return _complete(request, body)


def to_chat_of(body: ChatBody, request_id: str, answers: AnswerFormat) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest."""
    return _complete(to_chat_request(as_chat(body, answers), request_id, answers), body)


def as_chat(body: GenerateBody | ChatBody, answers: AnswerFormat) -> OpenAIChat:
    """What is asked for, as OpenAI's chat has it. Raises InvalidRequest."""
    if body.think and answers.reasoning is None:
        raise InvalidRequest(f'"{body.model}" does not support thinking', "think")
    fields: dict[str, Any] = {"model": to_model(body.model), "response_format": _response_format(body.format)}
    if isinstance(body, ChatBody):
        messages = body.messages or []
        fields["messages"] = [_message(message) for message in messages]
        fields["continue_final_message"] = any(_is_begun(message) for message in messages[-1:])
        fields["tools"] = body.tools or None
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        fields["messages"] = [*system, {"role": "user", "content": body.prompt or ""}]
    if answers.reasoning is not None and body.think is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": bool(body.think)}
        if isinstance(body.think, str):
            fields["reasoning_effort"] = body.think
    fields["include_reasoning"] = body.think is not False
    return validated(OpenAIChat, fields)


def _complete(request: inference_pb2.GenerateRequest, body: GenerateBody | ChatBody) -> inference_pb2.GenerateRequest:
    """With Ollama's sampling and its defaults, and with the tokens that a context is made of."""
    shows_marks = request.sampling.HasField("skip_special_tokens") and not request.sampling.skip_special_tokens
    request.sampling.CopyFrom(to_sampling(body.asked, (body.top_logprobs or 0) if body.logprobs else None))
    if shows_marks:
        request.sampling.skip_special_tokens = False
    request.clip_max_tokens = True  # the prompt alone must fit
    request.return_prompt_token_ids = isinstance(body, GenerateBody) and not body.raw
    request.model_sampling_defaults = False
    return request


def _message(message: Message) -> dict[str, Any]:
    if message.images:
        raise InvalidRequest("images are not supported yet", "images")
    calls = [_call(call) for call in message.tool_calls or ()]
    return {
        "role": message.role,
        "content": message.content or "",
        "reasoning": message.thinking,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
        "name": message.tool_name,
    }


def _is_begun(last: Message) -> bool:
    """Whether it is the beginning of the answer."""
    return last.role == "assistant" and bool((last.content or "").strip()) and not last.tool_calls


def _call(call: CalledTool) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": written(call.function.arguments or {}).decode()}
    return {"id": call.id, "type": "function", "function": function}


def _response_format(wanted: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not wanted:
        return None
    if wanted == "json":
        return {"type": "json_object"}
    if isinstance(wanted, str):
        raise InvalidRequest('format must be "json" or a JSON schema', "format")
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": wanted}}


def _form(wanted: str | dict[str, Any] | None) -> inference_pb2.StructuredOutput | None:
    fields = _response_format(wanted)
    return validated(ResponseFormat, fields).to_proto() if fields else None


def ignored(body: GenerateBody | ChatBody) -> list[str]:
    """Names of what has no effect: the model stays loaded, and its context is what it is."""
    names = unknown_fields(body)
    if body.keep_alive is not None:
        names.append("keep_alive")
    if body.shift:
        names.append("shift")
    return names
