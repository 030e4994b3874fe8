"""The families of models, by the names that vLLM's --tool-call-parser gives them.

hermes        <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>, again for each call
qwen3_coder   <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>
llama3_json   {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>; several with semicolons
json          the same with "arguments" or "parameters", or a list of them
mistral       [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]NAME[ARGS]{...} for each
deepseek_v3   between marks: function, NAME and arguments in a ```json block; deepseek_v31: NAME and arguments
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

    def forced(self, tools: Sequence[Tool], parallel: bool) -> Format:
        calls = {
            "type": "tags_with_separator", "tags": [self.tag(tool) for tool in tools], "separator": self.separator,
            "at_least_one": True, "stop_after_first": not parallel,
        }  # fmt: skip
        if not self.opening:
            return calls
        return {"type": "sequence", "elements": [_text(self.opening), calls, _text(self.closing)]}

    def free(self, tools: Sequence[Tool], parallel: bool) -> Format | None:
        if not self.trigger:
            return None
        return {
            "type": "triggered_tags", "triggers": [self.trigger], "tags": [self.tag(tool) for tool in tools],
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
