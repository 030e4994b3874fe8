"""JSON text of clients and models, in what orjson alone would get wrong: depth, and long integers."""

from __future__ import annotations

import json
from typing import Any

import orjson

MAX_DEPTH = 128


class TooDeep(ValueError):
    """What orjson reads (1024 levels) it cannot always write (254), and templates and schemas are deeper still."""

    def __init__(self) -> None:
        super().__init__(f"nested too deeply: more than {MAX_DEPTH} objects and lists in each other")


def check_depth(value: Any) -> None:
    """Raises TooDeep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        below = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in below if isinstance(inner, dict | list)]
    if level:
        raise TooDeep


def exact(text: str) -> orjson.Fragment:
    """The same JSON in one line, to be a part of what orjson writes: whole numbers of any length stay what they are.

    Raises ValueError: not JSON (NaN, infinity and lone surrogates included), or TooDeep.
    """
    check_depth(orjson.loads(text))  # strict, but it makes floats of whole numbers above 64 bits
    return orjson.Fragment(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")))


def exact_object(text: str) -> orjson.Fragment | dict[str, Any]:
    """The same of a call's arguments, for APIs in which they are an object: an empty one where the model wrote none."""
    try:
        return exact(text) if text.lstrip().startswith("{") else {}
    except ValueError:
        return {}
