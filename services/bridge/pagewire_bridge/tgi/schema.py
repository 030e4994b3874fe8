"""The request bodies of TGI's native API. Every optional parameter may be null."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pagewire.v1.inference_pb2 import StructuredOutput
from pagewire_core.errors import InvalidRequest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from pagewire_bridge.body import to_object
from pagewire_bridge.json_text import written

MAX_BEST_OF = 2
MAX_STOP_SEQUENCES = 4
MAX_TOP_N_TOKENS = 5

_UINT32_MAX = 2**32 - 1
Count = Annotated[int, Field(ge=1, le=_UINT32_MAX)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Grammar(_Body):
    """json: a schema, which must have properties, or its text; json_schema: one in an object under `schema`."""

    type: Literal["json", "regex", "json_schema"]
    value: dict[str, Any] | str

    def to_proto(self) -> StructuredOutput:
        """Raises InvalidRequest."""
        if self.type == "regex":
            if not isinstance(self.value, str):
                raise InvalidRequest("`grammar.value` of a regex must be a string", "grammar.value")
            return StructuredOutput(regex=self.value)
        schema = self.value
        if isinstance(schema, dict) and self.type == "json_schema":
            schema = schema.get("schema", schema)
        if isinstance(schema, str):
            schema = to_object(schema.encode(), "`grammar.value`")
        if self.type == "json" and "properties" not in schema:
            raise InvalidRequest("`grammar.value` must have a key `properties`", "grammar.value")
        return StructuredOutput(json_schema=written(schema).decode())


class Parameters(_Body):
    """do_sample: false as soon as there are parameters, as in TGI."""

    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    return_full_text: bool | None = None
    stop: Annotated[
        Annotated[list[str], Field(max_length=MAX_STOP_SEQUENCES)] | None,
        Field(validation_alias=AliasChoices("stop", "stop_sequences")),
    ] = None
    truncate: Count | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_TOP_N_TOKENS)] | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None

    @property
    def samples(self) -> bool:
        """TGI draws at random also where a parameter that only drawing heeds is there."""
        warped = (self.temperature or 1.0) != 1.0 or self.top_k is not None or self.top_p is not None
        warped = warped or self.typical_p is not None
        return bool(self.do_sample) or warped

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stop and "" in self.stop:
            raise InvalidRequest("`stop` must not contain an empty string", "stop")
        if (self.best_of or 1) > 1:
            if not self.samples:
                raise InvalidRequest("`best_of` greater than 1 needs sampling: set `do_sample` to true", "best_of")
            if self.seed is not None:
                raise InvalidRequest("`seed` must not be set when `best_of` is greater than 1", "seed")
        return self


class GenerateBody(_Body):
    """POST /generate, /generate_stream and, with `stream`, POST /."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters | None = None
    stream: bool | None = None

    @property
    def asked(self) -> Parameters:
        """Without any parameters TGI samples."""
        return Parameters(do_sample=True) if self.parameters is None else self.parameters


class VertexBody(_Body):
    instances: Annotated[list[dict[str, Any]], Field(min_length=1)]


class InferInput(_Body):
    name: str
    shape: list[int] | None = None
    datatype: str | None = None
    data: list[str] | list[int]


class InferOutput(_Body):
    name: str = "text_output"


class InferBody(_Body):
    """KServe's inference request: one input, the prompt, as a BYTES tensor (strings, or TGI's own bytes)."""

    id: str | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1)]
    parameters: Parameters | None = None
    outputs: list[InferOutput] | None = None
