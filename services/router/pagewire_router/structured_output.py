"""What a client asks of its output's form -> grammars in llguidance's form. Pure; hostile input may take long here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest

from pagewire_router.structural_tag import StructuralTag, lark_literal, regex_escaped

# Between JSON's tokens: nothing, a space, or a new line and its indent. Free white space is what weak models repeat.
WHITE_SPACE = r"[ ]|\r?\n[ \t]{0,24}"
# Of JSON Schema's formats; any other is an annotation, which constrains nothing.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_DATA = {"const", "enum", "default", "examples", "example"}  # keywords whose values are no schemas
_MAX_FACTOR = 10_000  # 3 MiB
_PARAM = "structured_outputs"


def to_constraint(
    wanted: inference_pb2.StructuredOutput | None,
    reasoning: inference_pb2.Reasoning | None,
    specials: Mapping[str, int],
) -> common_pb2.Constraint:
    """Not compiled yet. reasoning: the output begins with thoughts. specials: tokens that stand for no text.

    Raises InvalidRequest for what has no grammar.
    """
    constraint = common_pb2.Constraint()
    if wanted is not None:
        constraint.answer = _answer(wanted, specials)
    if reasoning is not None:
        constraint.reasoning = _thoughts(reasoning, specials)
        constraint.reasoning_end = f"start: {lark_literal(reasoning.end, specials)}"
        if reasoning.HasField("max_tokens"):
            constraint.reasoning_tokens = reasoning.max_tokens
    return constraint


def _answer(wanted: inference_pb2.StructuredOutput, specials: Mapping[str, int]) -> str:
    options = json_options(wanted)
    match wanted.WhichOneof("format"):
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(json_schema(wanted.json_schema), overrides=options)
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=options)
        case "regex":
            return LLMatcher.grammar_from_regex(wanted.regex)
        case "choice":
            return _choice(wanted.choice.texts)
        case "grammar":
            return LLMatcher.grammar_from_lark(lark(wanted.grammar))
        case "structural_tag":
            return StructuralTag(specials, options, json_schema, lark).grammar(_json(wanted.structural_tag))
    raise InvalidRequest("structured output needs a format", _PARAM)


def json_options(wanted: inference_pb2.StructuredOutput) -> Any:
    """llguidance's: a client's own white space wins over ours."""
    if wanted.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": wanted.whitespace_pattern or WHITE_SPACE}


def json_schema(schema: object) -> dict[str, Any]:
    """A schema, or its text, as llguidance takes it. Raises InvalidRequest."""
    if isinstance(schema, str):
        schema = _json(schema)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequest("a JSON schema must be an object", _PARAM)
    return {key: value for key, value in _known_formats(schema).items() if key != "x-guidance"}


def lark(grammar: str) -> str:
    """Lark as it is, GBNF as Lark. Raises InvalidRequest."""
    try:
        return any_to_lark(grammar)
    except Exception as error:  # the converter raises bare ones
        raise InvalidRequest(f"the grammar is neither Lark nor GBNF: {str(error)[:300]}", _PARAM) from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"this is not JSON: {error}", _PARAM) from error


def _known_formats(schema: Any) -> Any:
    """Without the formats that constrain nothing, for llguidance refuses what it does not know."""
    if isinstance(schema, list):
        return [_known_formats(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    _check_multiple(schema.get("multipleOf"))
    return {
        key: value if key in _DATA else _known_formats(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in _FORMATS
    }


def _check_multiple(factor: object) -> None:
    """The automaton has a state for every remainder; llguidance's limits do not count them."""
    if not isinstance(factor, int | float) or isinstance(factor, bool):
        return
    digits = Decimal(str(factor)).normalize().as_tuple().digits
    if len(digits) > 5 or int("".join(map(str, digits))) > _MAX_FACTOR:
        raise InvalidRequest(f"`multipleOf` may be {_MAX_FACTOR} at most, times a power of ten", _PARAM)


def _choice(texts: Iterable[str]) -> str:
    choices = list(texts)
    if not choices:
        raise InvalidRequest("`choice` must not be empty", _PARAM)
    return "start: " + " | ".join(lark_literal(text, {}) for text in choices)


def _thoughts(reasoning: inference_pb2.Reasoning, specials: Mapping[str, int]) -> str:
    """Their beginning, if there is one to come, and any text up to their end, with it."""
    if not reasoning.end:
        raise InvalidRequest("`reasoning` needs the end of thoughts", "reasoning")
    begin = lark_literal(reasoning.begin, specials) if reasoning.begin else ""
    if any(token in reasoning.end for token in specials):
        return f"start: {begin} /(?s:.*)/ {lark_literal(reasoning.end, specials)}"
    return f"start: {begin} thoughts\nthoughts[lazy]: /(?s:.*){regex_escaped(reasoning.end)}/"
