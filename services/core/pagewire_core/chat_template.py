"""Chat messages to a prompt, by the model's own Jinja template.

Templates are code from a download, so they run in Jinja's immutable sandbox, with the environment that
Hugging Face transformers documents for them: trim_blocks, lstrip_blocks, loop controls, the
`{% generation %}` tag, `raise_exception`, `strftime_now` and a `tojson` that leaves HTML alone.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from pagewire_core.chat_calls import call_forms
from pagewire_core.chat_roles import Message, forms
from pagewire_core.errors import InvalidRequest, StartupError
from pagewire_core.model_dir import read_json, special_token

# What a template may raise: Jinja's own errors, and Python's where it treats a value as what it is not.
_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
                    ValueError)  # fmt: skip

_PROBE = "a text to be found again"


class ChatTemplate:
    """One model's chat template; `render` raises InvalidRequest for what the template refuses."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "", tool_use: str | None = None) -> None:
        """tool_use: the template of chats with tools, where it is another. Raises StartupError for invalid Jinja."""
        constants = {"bos_token": bos_token, "eos_token": eos_token, "tools": None, "documents": None}
        self._plain = _Compiled(source, constants)
        self._tool_use = _Compiled(tool_use, constants) if tool_use else self._plain
        self.source = source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt; with `continue_final_message` it ends where the last message's content ends.

        What the template refuses it is asked for in other roles and with calls told in other ways (`chat_roles`,
        `chat_calls`), before that is the client's error.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest("add_generation_prompt and continue_final_message exclude each other")
        variables = {**(kwargs or {}), "add_generation_prompt": add_generation_prompt}
        template = self._tool_use if variables.get("tools") else self._plain
        refusal: Exception | None = None
        knows_developer = "developer" in template.source
        for form in chain.from_iterable(forms(told, knows_developer=knows_developer) for told in call_forms(messages)):
            try:
                text = template.render(form, variables)
            except _TEMPLATE_ERRORS as error:
                refusal = refusal or error
            else:
                return _open_end(text, form[-1]["content"]) if continue_final_message else text
        raise InvalidRequest(f"the chat template refused the messages: {refusal}", param="messages") from refusal


class _Compiled:
    """A template, and how it wants messages. constants: variables that renderings may replace."""

    def __init__(self, source: str, constants: dict[str, Any]) -> None:
        try:
            self._template = _environment().from_string(source, constants)
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
        self.source = source
        self._wants_parts = not self._shows(_PROBE) and self._shows(_as_parts(_PROBE))

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Raises _TEMPLATE_ERRORS."""
        if self._wants_parts:
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        return self._template.render(messages=list(messages), **variables)

    def _shows(self, content: object) -> bool:
        """Whether the prompt has a user's message of that content: templates for models that see may lose a string."""
        try:
            return _PROBE in self._template.render(messages=[{"role": "user", "content": content}])
        except _TEMPLATE_ERRORS:
            return False


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def load_chat_template(model_dir: Path, given: str | None = None) -> ChatTemplate | None:
    """The template `given` (a file or the template itself), else the model's; None if there is none."""
    named = {"default": _given(given)} if given else _own(model_dir)
    source = named.get("default", next(iter(named.values()), None))
    return ChatTemplate(source, *special_texts(model_dir), named.get("tool_use")) if source is not None else None


def special_texts(model_dir: Path) -> tuple[str, str]:
    """Beginning and end of a sequence, as templates name them; empty where there is none."""
    settings = read_json(model_dir / "tokenizer_config.json", {})
    return special_token(settings.get("bos_token")) or "", special_token(settings.get("eos_token")) or ""


def _given(given: str) -> str:
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StartupError(
            f"--chat-template {given} cannot be read: give a Jinja file or the template itself"
        ) from error


def _own(model_dir: Path) -> dict[str, str]:
    """A model's templates by name, as transformers saves them now and did before."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        others = {path.stem: path for path in (model_dir / "additional_chat_templates").glob("*.jinja")}
        return {name: path.read_text(encoding="utf-8") for name, path in (others | {"default": file}).items()}
    found = read_json(model_dir / "tokenizer_config.json", {}).get("chat_template")
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {"default": found} if found is not None else {}


def _open_end(text: str, content: str) -> str:
    """Cuts `text` after the last message's content, with its trailing space if the template kept it."""
    begin = text.rfind(content.strip())
    if begin < 0:
        raise InvalidRequest("the chat template changes the last message, so it cannot be continued", param="messages")
    with_space = content.lstrip()
    return text[: begin + len(with_space if text.startswith(with_space, begin) else content.strip())]


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what an assistant said; for a prompt it is plain text."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
