"""The request bodies of Ollama's API. Fields without an effect are ignored and named in a response header."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

KeepAlive = str | int | float


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _nearest(kind: type[int] | type[float], least: float, most: float) -> BeforeValidator:
    """Ollama takes any number, and cuts off the fraction where it wants a whole one."""

    def nearest(value: Any) -> Any:
        return min(max(kind(value), least), most) if type(value) in (int, float) else value

    return BeforeValidator(nearest, json_schema_input_type=float)


_Share = Annotated[float, _nearest(float, 0, 1)]
_Penalty = Annotated[float, _nearest(float, -2, 2)]
_Count = Annotated[int, _nearest(int, 0, 2**31 - 1)]


class Options(_Body):
    """Defaults are Ollama's own. A number out of its range is the nearest in it."""

    temperature: Annotated[float, _nearest(float, 0, math.inf)] | None = None
    top_p: Annotated[float, _nearest(float, 1e-6, 1)] | None = None
    top_k: _Count | None = None
    min_p: _Share | None = None
    typical_p: float | None = None
    repeat_penalty: Annotated[float, _nearest(float, 1e-6, math.inf)] | None = None
    repeat_last_n: Annotated[int, _nearest(int, -1, 2**31 - 1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: Annotated[int, _nearest(int, -(2**63), 2**63 - 1)] | None = None
    stop: list[str] | None = None
    num_predict: _Count | None = None
    num_ctx: _Count | None = None


class ModelBody(_Body):
    """`name` is the old spelling of `model`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class _Generation(_Body):
    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None
    think: bool | str | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def asked(self) -> Options:
        return self.options or Options()

    @property
    def unloads(self) -> bool:
        return self.keep_alive in (0, "0", "0s", "0m")


class GenerateBody(_Generation):
    """POST /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[Annotated[int, Field(ge=0, le=2**32 - 1)]] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class CalledFunction(_Body):
    name: str
    arguments: dict[str, Any] | None = None


class CalledTool(_Body):
    id: str | None = None
    function: CalledFunction


class Message(_Body):
    """arguments of calls are objects here, where OpenAI has JSON text."""

    role: Annotated[str, Field(min_length=1)]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[CalledTool] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ChatBody(_Generation):
    """POST /api/chat."""

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
