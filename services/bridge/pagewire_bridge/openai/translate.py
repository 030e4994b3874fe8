"""OpenAI's requests and model list to and from pagewire.v1: pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest

from pagewire_bridge.answer_parser import NO_FORMAT, AnswerFormat
from pagewire_bridge.json_text import written
from pagewire_bridge.model_names import to_served_name
from pagewire_bridge.openai.guided import guided_field
from pagewire_bridge.openai.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    Message,
    Sampling,
    SamplingBody,
    num_kept,
)
from pagewire_bridge.openai.tool_use import tool_use
from pagewire_bridge.timestamps import rfc3339

# OpenAI's service tiers as priorities; lower goes first.
_TIER_PRIORITY = {"flex": 10, "scale": -10, "priority": -10, "fast": -10}


def to_priority(body: GenerationBody) -> int:
    """What the request says itself counts; else what its tier stands for."""
    return _TIER_PRIORITY.get(body.service_tier or "", 0) if body.priority is None else body.priority


def to_sampling(
    body: Sampling, limit: int | None, logprobs: int | None, logprob_token_ids: Iterable[int] | None
) -> common_pb2.SamplingParams:
    """limit: of tokens; None: what fits. logprobs: how many alternatives beside the chosen token; None: no log
    probabilities at all. logprob_token_ids: whose log probabilities are told besides.
    """
    return common_pb2.SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        allowed_token_ids=body.allowed_token_ids or (),
        bad_words=body.bad_words or (),
        seed=None if body.seed is None else body.seed % 2**64,
        max_tokens=limit or 0,
        min_tokens=body.min_tokens or 0,
        stop=body.stop or (),
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        logprob_token_ids=logprob_token_ids or (),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens,
    )


def _to_sampling(body: GenerationBody, logprobs: int | None) -> common_pb2.SamplingParams:
    return to_sampling(body, body.length_limit(), logprobs, body.logprob_token_ids)


def to_structured_output(body: GenerationBody) -> inference_pb2.StructuredOutput | None:
    if body.structured_outputs is not None:
        return body.structured_outputs.to_proto()
    return body.response_format.to_proto() if body.response_format is not None else None


def to_beam_search(body: GenerationBody) -> inference_pb2.BeamSearch | None:
    return inference_pb2.BeamSearch(length_penalty=body.length_penalty) if body.use_beam_search else None


def to_truncation(body: SamplingBody) -> dict[str, Any]:
    """Fields of a GenerateRequest: how its prompt is cut."""
    return {
        "truncate_prompt_tokens": num_kept(body.truncate_prompt_tokens),
        "truncate_to_fit": body.truncate_prompt_tokens == -1,
        "keep_first_tokens": body.truncation_side == "right",
    }


def router_names(body: GenerationBody) -> dict[str, str]:
    """Fields of the body by what the router calls what they ask for."""
    names = {"logprobs": "top_logprobs"} if isinstance(body, ChatBody) else {}
    if guided := guided_field(body):
        names["structured_outputs"] = guided
    elif body.structured_outputs is None:
        asked = body.response_format is not None and body.response_format.type != "text"
        tools = "functions" if isinstance(body, ChatBody) and body.functions else "tools"
        names |= dict.fromkeys(("structured_outputs", "structural_tag"), "response_format" if asked else tools)
    return names


def to_chat(body: ChatBody) -> inference_pb2.Chat:
    """Raises InvalidRequest for message content that is not text."""
    add_generation_prompt = body.add_generation_prompt
    if body.continue_final_message:
        add_generation_prompt = False  # the two exclude each other, and only one of them was asked for
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs |= {"enable_thinking": body.reasoning_effort != "none", **kwargs}
        kwargs["reasoning_effort"] = body.reasoning_effort
    if body.documents is not None:
        kwargs["documents"] = body.documents
    tools = body.tools if body.tool_choice != "none" else None
    return inference_pb2.Chat(
        messages=[_to_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs_json=written(kwargs).decode() if kwargs else "",
        chat_template=body.chat_template or "",
        tools_json=written([tool.for_template() for tool in tools]).decode() if tools else "",
    )


def to_chat_request(
    body: ChatBody, request_id: str, answers: AnswerFormat = NO_FORMAT
) -> inference_pb2.GenerateRequest:
    """answers: how the model writes calls and thoughts. Raises InvalidRequest."""
    use, reasoning = tool_use(body, answers), _reasoning(body, answers)
    sampling = _to_sampling(body, (body.top_logprobs or 0) if body.logprobs else None)
    if body.skip_special_tokens is None and (reasoning or (use.form and use.form.needs_special_tokens)):
        sampling.skip_special_tokens = False  # the marks may be such tokens
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=to_served_name(body.model),
        chat=to_chat(body),
        sampling=sampling,
        n=body.n or 1,
        cache_salt=body.cache_salt or "",
        session_id=body.session,
        add_special_tokens=body.add_special_tokens,
        return_prompt_token_ids=bool(body.return_token_ids),
        structured_output=use.output(to_structured_output(body)),
        reasoning=reasoning,
        priority=to_priority(body),
        prompt_logprobs=body.prompt_logprobs,
        model_sampling_defaults=True,
        beam_search=to_beam_search(body),
        **to_truncation(body),
    )


def _reasoning(body: ChatBody, answers: AnswerFormat) -> inference_pb2.Reasoning | None:
    form = answers.reasoning
    if form is None and body.thinking_token_budget is not None:
        raise InvalidRequest("`thinking_token_budget` needs --reasoning-parser to be set.", "thinking_token_budget")
    if form is None or body.continue_final_message:
        return None
    return inference_pb2.Reasoning(begin=form.begin, end=form.end, max_tokens=body.thinking_token_budget)


def to_completion_requests(body: CompletionBody, request_id: str) -> list[inference_pb2.GenerateRequest]:
    """One request per prompt; where there are several, their ids end in -0, -1 and so on."""
    several = len(body.prompt) > 1
    asked = [number for number in (body.prompt_logprobs, body.echoed_logprobs) if number is not None]
    return [
        inference_pb2.GenerateRequest(
            request_id=f"{request_id}-{i}" if several else request_id,
            model=to_served_name(body.model),
            text=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else inference_pb2.TokenIds(ids=prompt),
            sampling=_to_sampling(body, body.logprobs),
            n=body.n or 1,
            echo=bool(body.echo),
            cache_salt=body.cache_salt or "",
            session_id=body.session,
            completion_default_length=True,
            add_special_tokens=body.add_special_tokens,
            return_prompt_token_ids=bool(body.return_token_ids),
            structured_output=to_structured_output(body),
            priority=to_priority(body),
            prompt_logprobs=max(asked) if asked else None,
            prompt_only=body.max_tokens == 0,
            model_sampling_defaults=True,
            beam_search=to_beam_search(body),
            **to_truncation(body),
        )
        for i, prompt in enumerate(body.prompt)
    ]


def chat_echo(body: ChatBody) -> str:
    """What `echo` puts before every choice: the final message, where the choice continues its role (as vLLM)."""
    last = body.messages[-1]
    if not body.echo or last.role != "assistant":
        return ""
    return _to_text(last, f"messages[{len(body.messages) - 1}]")


def from_model(model: inference_pb2.Model) -> dict[str, object]:
    """The model object, with vLLM's extra keys, and Anthropic's, whose API has its models at the same path."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "pagewire",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_len,
        "permission": [],
        "type": "model",
        "display_name": model.name,
        "created_at": rfc3339(model.created),
        "max_input_tokens": model.max_model_len,
    }


def from_models(models: Iterable[inference_pb2.Model]) -> dict[str, object]:
    data = [from_model(model) for model in models]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": False, **ends}


def _to_message(message: Message, where: str) -> inference_pb2.ChatMessage:
    fields: dict[str, object] = {}
    if message.tool_calls:
        fields["tool_calls"] = [call.to_fields(f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if thoughts := message.reasoning if message.reasoning_content is None else message.reasoning_content:
        fields |= {"reasoning_content": thoughts, "reasoning": thoughts}
    return inference_pb2.ChatMessage(
        role=message.role,
        content=_to_text(message, where),
        name=message.name or "",
        fields_json=written(fields).decode() if fields else "",
    )


def _to_text(message: Message, where: str) -> str:
    """The content as one string; parts are joined without anything between them."""
    where = f"{where}.content"
    if isinstance(message.content, str):
        return message.content
    if isinstance(message.content, list):
        return "".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(message.content))
    if message.content is None and message.role == "assistant":
        return ""
    raise InvalidRequest(f"`{where}` must be a string or a list of text parts.", where)


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(f"`{where}` must be an object with a `type`.", where)
    kind = part["type"]
    if kind not in ("text", "refusal"):
        raise InvalidRequest(f"`{where}` has a type that is not supported yet; only text is.", where)
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"`{where}.{kind}` must be a string.", f"{where}.{kind}")
    return text
