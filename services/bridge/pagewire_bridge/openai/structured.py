"""`response_format` of OpenAI and `structured_outputs` of vLLM, as the native API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pagewire.v1.inference_pb2 import StructuredOutput, Texts
from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pagewire_bridge.json_text import TooDeep, read, written

_KINDS = ("json_", "regex", "choice", "grammar", "json_object", "structural_tag")


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)


class JsonSchema(_Shape):
    """`name`, `description` and `strict` change nothing: a schema is always enforced."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Shape):
    """OpenAI's, and its kin. value: TGI's; a schema or its text, for json_schema an object that has it, for regex that.
    schema: llama.cpp's, with json_object.
    """

    type: Literal["text", "json_object", "json_schema", "structural_tag", "json", "regex"]
    value: dict[str, Any] | str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type in ("json", "regex") or self.value is not None:
            self._check_value()
            return self
        if self.schema_ is not None and self.type != "json_object":
            raise InvalidRequest("`response_format.schema` is for `json_object` alone.", "response_format.schema")
        if self.type == "json_schema" and self.json_schema is None:
            raise InvalidRequest("`response_format.json_schema` is required.", "response_format.json_schema")
        if self.type == "structural_tag" and self.format is None and (self.structures is None or self.triggers is None):
            raise InvalidRequest("A structural tag needs `format`, or `structures` and `triggers`.", "response_format")
        return self

    def _check_value(self) -> None:
        where = "response_format.value"
        if self.value is None:
            raise InvalidRequest(f"`{where}` is required.", where)
        if self.type in ("text", "structural_tag") or self.json_schema or self.schema_ is not None:
            raise InvalidRequest(f"`{where}` is for a schema or a regex alone.", where)
        if self.type == "regex" and not isinstance(self.value, str):
            raise InvalidRequest(f"`{where}` must be a string.", where)
        if self.type != "regex":
            _check_depth(self.value, where)

    def to_proto(self) -> StructuredOutput | None:
        """None for plain text."""
        if self.type == "text":
            return None
        if self.value is not None:
            return self._of_value(self.value)
        if self.schema_ is not None:
            return StructuredOutput(json_schema=_text(self.schema_))
        if self.type == "json_object" or (self.json_schema and self.json_schema.schema_ is None):
            return StructuredOutput(json_object=True)
        if self.json_schema:
            return StructuredOutput(json_schema=_text(self.json_schema.schema_))
        older: dict[str, Any] = {"structures": self.structures, "triggers": self.triggers}
        return StructuredOutput(structural_tag=_text(older if self.format is None else {"format": self.format}))

    def _of_value(self, value: dict[str, Any] | str) -> StructuredOutput:
        if self.type == "regex":
            return StructuredOutput(regex=_text(value))
        if self.type == "json_schema" and isinstance(value, dict):
            value = value.get("schema", value)
        return StructuredOutput(json_schema=_text(value))


class StructuredOutputs(_Shape):
    """Exactly one of the forms; `json` and `structural_tag` may be JSON text."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(kind.rstrip("_") for kind in _KINDS)
            raise InvalidRequest(f"`structured_outputs` needs exactly one of {names}.", "structured_outputs")
        _check_depth(self.json_ if self.structural_tag is None else self.structural_tag, "structured_outputs")
        return self

    def to_proto(self) -> StructuredOutput:
        return StructuredOutput(
            json_schema=None if self.json_ is None else _text(self.json_),
            regex=self.regex,
            choice=None if self.choice is None else Texts(texts=self.choice),
            grammar=self.grammar,
            json_object=self.json_object or None,
            structural_tag=None if self.structural_tag is None else _text(self.structural_tag),
            whitespace_pattern=self.whitespace_pattern or "",
            disable_any_whitespace=bool(self.disable_any_whitespace),
        )


def _check_depth(value: dict[str, Any] | str | None, where: str) -> None:
    """Of text, whose other mistakes the router tells. Raises InvalidRequest."""
    try:
        read(value.encode() if isinstance(value, str) else b"null")
    except TooDeep as error:
        raise InvalidRequest(f"`{where}` is {error}.", where) from None
    except ValueError:
        pass


def _text(value: dict[str, Any] | str | None) -> str:
    return value if isinstance(value, str) else written(value).decode()
