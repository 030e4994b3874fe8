"""What the form of an answer must be so that it calls tools as it should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pagewire.v1.inference_pb2 import StructuredOutput

from pagewire_bridge.tools.calls import Tool, ToolFormat


def output_with_tools(
    wanted: StructuredOutput | None,
    form: ToolFormat,
    tools: Sequence[Tool],
    mode: Literal["auto", "required"],
    parallel: bool,
) -> StructuredOutput | None:
    """required: one of `tools` is called, whatever form a text was to have. auto: the text has the form that is wanted,
    or is a call; without a form, calls of strict tools follow their schemas, and texts for custom tools their grammars,
    where the family's marks tell calls apart.
    """
    if mode == "required":
        return _tagged(form.forced(tools, parallel))
    if wanted is not None:
        return _tagged({"type": "or", "elements": [form.forced(tools, parallel), _as_tag(wanted)]})
    free = form.free(tools, parallel) if any(tool.strict or tool.form for tool in tools) else None
    return None if free is None else _tagged(free)


def _tagged(form: dict[str, Any]) -> StructuredOutput:
    return StructuredOutput(structural_tag=json.dumps({"type": "structural_tag", "format": form}))


def _as_tag(wanted: StructuredOutput) -> dict[str, Any]:
    match wanted.WhichOneof("format"):
        case "json_schema":
            return {"type": "json_schema", "json_schema": _read(wanted.json_schema)}
        case "regex":
            return {"type": "regex", "pattern": wanted.regex}
        case "choice":
            texts = [{"type": "const_string", "value": text} for text in wanted.choice.texts]
            return {"type": "or", "elements": texts}
        case "grammar":
            return {"type": "grammar", "grammar": wanted.grammar}
        case "structural_tag":
            tag = _read(wanted.structural_tag)
            return tag.get("format", tag) if isinstance(tag, dict) else {}
    return {"type": "json_schema", "json_schema": {"type": "object"}}


def _read(text: str) -> Any:
    """JSON, or what the router will refuse."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
