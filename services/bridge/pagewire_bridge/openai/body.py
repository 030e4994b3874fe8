"""From bytes to a validated body of the OpenAI API."""

from __future__ import annotations

from typing import Any, TypeVar

from pagewire_bridge.body import to_object, validated
from pagewire_bridge.openai.functions import with_tools
from pagewire_bridge.openai.guided import with_structured_outputs
from pagewire_bridge.openai.schema import ChatBody, GenerationBody
from pagewire_bridge.openai.unsupported import refuse_unsupported, refuse_unsupported_in_message, unknown_fields

# A beam search draws nothing.
_SAYS_HOW_TO_DRAW = ("temperature", "top_p", "top_k", "min_p", "seed")

Body = TypeVar("Body", bound=GenerationBody)


def parse_body(model: type[Body], data: bytes) -> Body:
    """Raises InvalidRequest: not a JSON object, a bad field, or one that asks for what this version does not do."""
    return read_body_fields(model, to_object(data))


def read_body_fields(model: type[Body], fields: dict[str, Any]) -> Body:
    """The same of an object."""
    refuse_unsupported(fields, chat=issubclass(model, ChatBody))
    body = validated(model, fields)
    if isinstance(body, ChatBody):
        for i, message in enumerate(body.messages):
            refuse_unsupported_in_message(message.model_extra or {}, f"messages[{i}]")
        with_tools(body)
    with_structured_outputs(body)
    return body


def ignored_fields(body: GenerationBody) -> list[str]:
    """Names of the fields that have no effect."""
    without_effect = _SAYS_HOW_TO_DRAW if body.use_beam_search else ("length_penalty",)
    return unknown_fields(body) + [name for name in without_effect if getattr(body, name) is not None]
