"""The request bodies of the OpenAI API with vLLM's extra parameters, as pydantic models.

Strict: "3" is not 3 and true is not 1; whole numbers stand for floats. Every optional parameter may be
null. Fields that are not here land in `model_extra`: ignored, and named in a response header.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pagewire_core.errors import InvalidRequest
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from pagewire_bridge.openai.structured import ResponseFormat, StructuredOutputs
from pagewire_bridge.openai.tools import AnyCalledTool, CalledFunction, FunctionChoice, Functions, ToolChoice, Tools

MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 1024
MAX_LOGPROB_TOKEN_IDS = 128
MAX_PROMPTS = 256  # each is a call of its own to the router
DEFAULT_COMPLETION_TOKENS = 16

_UINT32_MAX = 2**32 - 1
_INT64_MAX = 2**63 - 1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
_TOKEN_ID_KEY = re.compile(r"[0-9]{1,10}")

TokenId = Annotated[int, Field(ge=0, le=_UINT32_MAX)]
TokenCount = Annotated[int, Field(ge=1, le=_UINT32_MAX)]
NumLogprobs = Annotated[int, Field(ge=0, le=_UINT32_MAX)]  # the router says how many are too many
Penalty = Annotated[float, Field(ge=-2, le=2)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=1024)]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
# As they are described; functions below judge them.
_Stop = Annotated[str, Field(min_length=1)]
_Stops = _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOP_STRINGS)] | None
_BadWord = Annotated[str, Field(min_length=1, max_length=256)]
_TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = str | _TokenIds | Annotated[list[str | _TokenIds], Field(min_length=1)]
_BiasedToken = Annotated[str, WithJsonSchema({"type": "string", "pattern": f"^{_TOKEN_ID_KEY.pattern}$"})]
_RequestId = Annotated[str, WithJsonSchema({"type": "string", "pattern": f"^{_REQUEST_ID.pattern}$"})]
_OLDER = Field(description="As the field of this name in `structured_outputs`; vLLM's before there was that.")
_TRUNCATION = {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1, "maximum": _INT64_MAX}]}
_TextPart = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_RefusalPart = {
    "type": "object",
    "properties": {"type": {"const": "refusal"}, "refusal": {"type": "string"}},
    "required": ["type", "refusal"],
}
_Content = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _TextPart, _RefusalPart]}},
                {"type": "null"},
            ]
        }
    ),
]


def is_sane_request_id(text: str) -> bool:
    """Whether a client's id may be echoed in headers and logs."""
    return _REQUEST_ID.fullmatch(text) is not None


def _stop_list(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and "" in stops:
        raise InvalidRequest("`stop` must not contain an empty string.", "stop")
    return stops


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i <= _UINT32_MAX for i in value)


def prompts(value: object, name: str = "prompt", most: int = MAX_PROMPTS) -> list[str | list[int]]:
    """The four shapes of a prompt as one list of prompts. name: of the field. Raises InvalidRequest."""
    whole = [value] if isinstance(value, str) or (value and _is_token_ids(value)) else value
    if not isinstance(whole, list) or not whole:
        raise InvalidRequest(f"`{name}` must be a string, strings, token ids or lists of token ids.", name)
    if len(whole) > most:
        raise InvalidRequest(f"`{name}` may hold at most {most} prompts; send several requests.", name)
    for i, prompt in enumerate(whole):
        if not isinstance(prompt, str) and not (prompt and _is_token_ids(prompt)):
            where = f"{name}[{i}]"
            raise InvalidRequest(f"`{where}` must be a string or a non-empty list of token ids.", where)
    return whole


def _token_bias(value: dict[str, float] | None) -> dict[str, float] | None:
    if not all(_TOKEN_ID_KEY.fullmatch(key) and int(key) <= _UINT32_MAX for key in value or ()):
        raise InvalidRequest("The keys of `logit_bias` must be token ids as strings.", "logit_bias")
    return value


def _truncation(value: int | None) -> int | None:
    if value == 0:
        raise InvalidRequest("`truncate_prompt_tokens` must be at least 1, or -1.", "truncate_prompt_tokens")
    return value


Truncation = Annotated[
    Annotated[int, Field(ge=-1, le=_INT64_MAX), WithJsonSchema(_TRUNCATION)] | None, AfterValidator(_truncation)
]


def num_kept(asked: int | None) -> int:
    """Tokens that a prompt is cut to, as messages to the router have it: 0, that none is, or that it is cut to fit."""
    return min(max(asked or 0, 0), _UINT32_MAX)


def _request_id(value: str) -> str:
    if not is_sane_request_id(value):
        raise InvalidRequest("`request_id` must be 1 to 128 letters, digits or ._:@/+=- characters.", "request_id")
    return value


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


RequestId = Annotated[_RequestId, AfterValidator(_request_id)]


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: Annotated[
        bool | None, Field(description="With `include_usage`: every chunk says how many tokens there are so far.")
    ] = None


def check_stream_options(options: StreamOptions | None, stream: bool | None) -> None:
    """Raises InvalidRequest where they ask for something and there is no stream for it."""
    if options is not None and (options.include_usage or options.continuous_usage_stats) and not stream:
        raise InvalidRequest("`stream_options` is only allowed with `stream: true`.", "stream_options")


def check_min_tokens(at_least: int | None, limit: int | None) -> None:
    """Raises InvalidRequest where an answer must be longer than it may be."""
    if limit is not None and (at_least or 0) > limit:
        raise InvalidRequest("`min_tokens` must not be greater than the limit of tokens.", "min_tokens")


class Sampling(_Body):
    """How tokens are chosen, and where the answer ends."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[
        dict[_BiasedToken, Annotated[float, Field(ge=-100, le=100)]] | None, AfterValidator(_token_bias)
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[
        Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None,
        BeforeValidator(_stop_list, json_schema_input_type=_Stops),
    ] = None
    stop_token_ids: list[TokenId] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    bad_words: Annotated[list[_BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_UINT32_MAX)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None


class SamplingBody(Sampling):
    """What every endpoint that generates text takes. `model` absent: the only model."""

    model: str | None = None
    stream: bool | None = None
    truncate_prompt_tokens: Truncation = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: CacheSalt | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    session_id: Annotated[str, Field(max_length=1024)] | None = None
    priority: Priority | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None

    @property
    def session(self) -> str:
        """Requests of one session are best placed where the one before was."""
        return self.session_id or self.prompt_cache_key or self.user or ""


class GenerationBody(SamplingBody):
    """What chats and completions take."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    add_special_tokens: bool | None = None
    request_id: RequestId | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    prompt_logprobs: NumLogprobs | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_TOKEN_IDS)] | None = None
    response_format: ResponseFormat | None = None
    guided_json: Annotated[dict[str, Any] | str | None, _OLDER] = None
    guided_regex: Annotated[str | None, _OLDER] = None
    guided_choice: Annotated[list[str] | None, _OLDER] = None
    guided_grammar: Annotated[str | None, _OLDER] = None
    guided_whitespace_pattern: Annotated[str | None, _OLDER] = None
    use_beam_search: Annotated[
        bool | None, Field(description="The choices are the n best sequences that a beam search of width n finds.")
    ] = None
    length_penalty: Annotated[
        float | None,
        Field(ge=-10, le=10, description="Of a beam search; above 0 favours long sequences. 1 unless given."),
    ] = None

    def length_limit(self) -> int | None:
        """Tokens asked for at most; None: what fits."""
        return self.max_tokens

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_stream_options(self.stream_options, self.stream)
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            raise InvalidRequest("`response_format` and `structured_outputs` exclude each other.", "response_format")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("`prompt_logprobs` are not available with `stream: true`.", "prompt_logprobs")
        check_min_tokens(self.min_tokens, self.length_limit())
        return self


class Message(_Body):
    """content: text, or parts of it; an assistant's may be null."""

    role: Annotated[str, Field(min_length=1)]
    content: _Content = None
    name: str | None = None
    tool_calls: list[AnyCalledTool] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ConversationBody(_Body):
    """What chats and responses take alike."""

    chat_template: Annotated[
        str | None,
        Field(description="Jinja. Refused unless the server was started with --trust-request-chat-template."),
    ] = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=_UINT32_MAX)] | None = None


class ChatBody(GenerationBody, ConversationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionChoice | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    include_reasoning: bool | None = None

    def length_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _consistent_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", "top_logprobs")
        if self.logprob_token_ids and not self.logprobs:
            raise InvalidRequest("`logprob_token_ids` needs `logprobs: true`.", "logprob_token_ids")
        if self.tools is None and self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("`tool_choice` needs `tools`.", "tool_choice")
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "`continue_final_message` and `add_generation_prompt` exclude each other.", "continue_final_message"
            )
        return self


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(prompts, json_schema_input_type=Prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=_UINT32_MAX)] | None = None
    logprobs: NumLogprobs | None = None
    best_of: int | None = None

    @property
    def echoed_logprobs(self) -> int | None:
        """How many of the best come with each of the prompt's tokens before a choice; None: no such tokens do."""
        return self.logprobs if self.echo else None

    def length_limit(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _consistent_completion(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("`best_of` other than `n` is not supported yet.", "best_of")
        if self.logprob_token_ids and self.logprobs is None:
            raise InvalidRequest("`logprob_token_ids` needs `logprobs`.", "logprob_token_ids")
        if self.stream and self.use_beam_search:
            raise InvalidRequest("A beam search of a completion cannot be streamed.", "stream")
        if self.max_tokens == 0 and self.use_beam_search:
            raise InvalidRequest("`max_tokens` must be at least 1 with beam search.", "max_tokens")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("`max_tokens` must be at least 1, but with `echo: true`.", "max_tokens")
        return self
