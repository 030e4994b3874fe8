"""What this version cannot honour, of every API.

One rule: a field of an API whose value asks for another text or another answer than we would give is
refused with its name; null and the values that ask for nothing are accepted. Every other field without an
effect, such as one of another API, is ignored, and named in the header `x-pagewire-ignored-fields`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pagewire_core.errors import InvalidRequest
from pydantic import BaseModel

# Field -> values that ask for nothing; null is always one.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "suffix": ("",),
    "watermarking": (False,),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGE = ("audio",)
# Of chats; other APIs do not have them.
_FUNCTIONS: dict[str, tuple[object, ...]] = {"function_call": ("none", "auto"), "functions": ([],)}
_UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[object, ...]] = {
    "chat_template": ("",), "documents": ([],), "tool_choice": ("none", "auto"), "tools": ([],), **_FUNCTIONS
}  # fmt: skip
# Of OpenAI's Responses API.
_UNSUPPORTED_IN_RESPONSES: dict[str, tuple[object, ...]] = {
    "context_management": ([],), "image": (), "prompt": (),
    "return_tokens_as_token_ids": (False,), "use_beam_search": (False,), **_FUNCTIONS,
}  # fmt: skip
# Of Anthropic's Messages API.
_UNSUPPORTED_IN_MESSAGES: dict[str, tuple[object, ...]] = {"container": (), "mcp_servers": ([],)}
_HARMLESS = _UNSUPPORTED | _UNSUPPORTED_IN_COMPLETIONS | _UNSUPPORTED_IN_RESPONSES | _UNSUPPORTED_IN_MESSAGES
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_NAMED = 32


def _asks(value: object, harmless: Iterable[object]) -> bool:
    """Whether a value asks for something."""
    return value is not None and not any(type(value) is type(h) and value == h for h in harmless)


def refuse_unsupported(body: Mapping[str, object], chat: bool) -> None:
    """Raises InvalidRequest for the first field that asks for what this version does not do."""
    _refuse(body, _UNSUPPORTED if chat else _UNSUPPORTED | _UNSUPPORTED_IN_COMPLETIONS)


def refuse_unsupported_in_responses(body: Mapping[str, object]) -> None:
    """The same for POST /v1/responses."""
    _refuse(body, _UNSUPPORTED | _UNSUPPORTED_IN_RESPONSES)


def refuse_unsupported_in_messages(body: Mapping[str, object]) -> None:
    """The same for POST /v1/messages and its count."""
    _refuse(body, _UNSUPPORTED_IN_MESSAGES)


def refuse_unsupported_in_tokens(body: Mapping[str, object]) -> None:
    """The same for POST /inference/v1/generate, whose parameters of sampling are an object in the body."""
    _refuse(body, {"features": ()})  # of images and the like
    sampling = body.get("sampling_params")
    _refuse(sampling if isinstance(sampling, Mapping) else {}, _UNSUPPORTED, "sampling_params.")


def _refuse(body: Mapping[str, object], unsupported: Mapping[str, Iterable[object]], where: str = "") -> None:
    """where: what stands before a name in the error's `param`."""
    for name, harmless in unsupported.items():
        if _asks(body.get(name), harmless):
            raise InvalidRequest(f"`{name}` is not supported yet.", where + name)


def refuse_unsupported_in_message(fields: Mapping[str, object], where: str) -> None:
    """The same for the fields of one message; `where` is its place, such as messages[0]."""
    for name in _UNSUPPORTED_IN_MESSAGE:
        if _asks(fields.get(name), ([],)):
            raise InvalidRequest(f"`{name}` of a message is not supported yet.", f"{where}.{name}")


def unknown_fields(body: BaseModel, where: str = "") -> list[str]:
    """Names of the fields that nothing was made of, but not where their value asks for nothing.

    Those of an object in the body have its name before theirs; where: what stands before all of them.
    """
    extra = body.model_extra or {}
    names = [where + name for name, value in extra.items() if _asks(value, _HARMLESS.get(name, ()))]
    for name, value in body:
        if isinstance(value, BaseModel):
            names += unknown_fields(value, f"{where}{name}.")
    return names


def ignored_fields_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names ignored fields; names that could break a header are left out."""
    named = sorted({name for name in names if _HEADER_SAFE.fullmatch(name)})
    return {"x-pagewire-ignored-fields": ",".join(named[:_MAX_NAMED])} if named else {}
