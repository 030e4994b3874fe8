"""vLLM's `guided_*`: what clients sent before there was `structured_outputs`, and still send."""

from __future__ import annotations

from pagewire_core.errors import InvalidRequest

from pagewire_bridge.openai.schema import GenerationBody
from pagewire_bridge.openai.structured import StructuredOutputs

# Field -> its name among the structured outputs.
_FORMS = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def guided_field(body: GenerationBody) -> str | None:
    """The field of the body that asks for a form; None: it has none of them."""
    return next((name for name in _FORMS if getattr(body, name) is not None), None)


def with_structured_outputs(body: GenerationBody) -> None:
    """Asks for the same form by `structured_outputs`. Raises InvalidRequest where two forms are asked for."""
    given = [name for name in _FORMS if getattr(body, name) is not None]
    if not given:
        return
    others = [name for name in ("structured_outputs", "response_format") if _asks(body, name)]
    if len(given) + len(others) > 1:
        first, second, *_ = (*given, *others)
        raise InvalidRequest(f"`{first}` and `{second}` exclude each other.", first)
    form = {_FORMS[given[0]]: getattr(body, given[0]), "whitespace_pattern": body.guided_whitespace_pattern}
    body.structured_outputs = StructuredOutputs(**form)


def _asks(body: GenerationBody, name: str) -> bool:
    asked = getattr(body, name)
    return asked is not None and getattr(asked, "type", "") != "text"
