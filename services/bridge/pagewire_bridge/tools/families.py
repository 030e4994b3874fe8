"""The families of models, by the names that vLLM's --tool-call-parser gives them.

hermes        <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>, again for each call
qwen3_coder   <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>
llama3_json   {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>; several with semicolons
json          the same with "arguments" or "parameters", or a list of them
mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]NAME[ARGS]{...} for each
deepseek_v3   between marks: function, NAME and arguments in a ```json block; deepseek_v31: NAME and arguments

A text that must follow a grammar of the client's (Tool.form) stands in no JSON, where its quotes would be others, and
before no mark, which may follow the grammar as well: in every family, `<text>` is in the place of the arguments, and
the text is all the rest of the answer. Models that are not held to it call such a tool as they call others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pagewire_bridge.tools.bare_json import BareJsonParser
from pagewire_bridge.tools.calls import CallParser, Tool, ToolFormat
from pagewire_bridge.tools.marked import DeepSeekParser, HermesParser, MistralParser
from pagewire_bridge.tools.xml import XmlParser, xml_call

Format = dict[str, Any]


def _tag(begin: str, tool: Tool, end: str) -> Format:
    return {
        "type": "tag",
        "begin": begin,
        "content": {"type": "json_schema", "json_schema": tool.parameters},
        "end": end,
    }


def _json_tag(arguments: str, begin: str = "", end: str = "") -> Callable[[Tool], Format]:
    def of(tool: Tool) -> Format:
        return _tag(f'{begin}{{"name": {json.dumps(tool.name)}, "{arguments}": ', tool, f"}}{end}")

    return of


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


@dataclass(frozen=True)
class Family:
    """A ToolFormat: calls of form `tag`, `separator` between them, all of them between `opening` and `closing`.

    trigger: the mark that no text has, if there is one; then calls may be held to their schemas in free text, too.
    """

    make_parser: Callable[[Sequence[Tool]], CallParser]
    tag: Callable[[Tool], Format]
    separator: str
    opening: str = ""
    closing: str = ""
    trigger: str = ""
    needs_special_tokens: bool = True

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        return self.make_parser(tools)

    def text_mark(self, tool: Tool) -> str:
        return f"{self.opening}{self._text_begin(tool)}"

    def _text_begin(self, tool: Tool) -> str:
        return f"{self.tag(tool)['begin']}<text>\n"

    def _text_calls(self, tools: Sequence[Tool]) -> list[Format]:
        return [
            {"type": "tag", "begin": self._text_begin(tool), "content": tool.form, "end": ""}
            for tool in tools
            if tool.form
        ]

    def forced(self, tools: Sequence[Tool], parallel: bool) -> Format:
        forms = self._text_calls(tools)
        if tags := [self.tag(tool) for tool in tools if not tool.form]:
            calls: Format = {
                "type": "tags_with_separator", "tags": tags, "separator": self.separator,
                "at_least_one": True, "stop_after_first": not parallel,
            }  # fmt: skip
            forms.insert(0, _sequence(calls, _text(self.closing)) if self.closing else calls)
        form = forms[0] if len(forms) == 1 else {"type": "or", "elements": forms}
        return _sequence(_text(self.opening), form) if self.opening else form

    def free(self, tools: Sequence[Tool], parallel: bool) -> Format | None:
        if not self.trigger:
            return None
        return {
            "type": "triggered_tags", "triggers": [self.trigger],
            "tags": [self.tag(tool) for tool in tools if not tool.form], "last_tags": self._text_calls(tools),
            "at_least_one": False, "stop_after_first": not parallel,
        }  # fmt: skip


_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END, _SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

_HERMES = Family(HermesParser, _json_tag("arguments", "<tool_call>\n", "\n</tool_call>"), "\n", trigger="<tool_call>")
_JSON = Family(BareJsonParser, _json_tag("arguments"), "; ", needs_special_tokens=False)
_LLAMA = replace(_JSON, tag=_json_tag("parameters"))
_XML = Family(XmlParser, xml_call, "\n", trigger="<tool_call>")
_MISTRAL = Family(MistralParser, _json_tag("arguments"), ", ", "[TOOL_CALLS][", "]")
_DEEPSEEK_V3 = Family(
    DeepSeekParser,
    lambda tool: _tag(f"{_CALL_BEGIN}function{_SEP}{tool.name}\n```json\n", tool, f"\n```{_CALL_END}"),
    "\n", _CALLS_BEGIN, _CALLS_END,
)  # fmt: skip
_DEEPSEEK_V31 = replace(
    _DEEPSEEK_V3, tag=lambda tool: _tag(f"{_CALL_BEGIN}{tool.name}{_SEP}", tool, _CALL_END), separator=""
)

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": _HERMES, "qwen": _HERMES, "qwen25": _HERMES, "qwen3": _HERMES,
    "qwen3_coder": _XML, "qwen3_xml": _XML,
    "llama3_json": _LLAMA, "llama4_json": _LLAMA,
    "json": _JSON,
    "mistral": _MISTRAL,
    "deepseek_v3": _DEEPSEEK_V3, "deepseek_v31": _DEEPSEEK_V31,
}  # fmt: skip
