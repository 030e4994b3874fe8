"""JSON in one line, for streams whose events are lines."""

from __future__ import annotations

from collections.abc import Mapping

from pagewire_bridge.json_text import written

# JSON escapes control characters. These end a line all the same for Python's str.splitlines, and so for httpx and every
# client that reads its lines.
_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")


def json_line(content: Mapping[str, object]) -> bytes:
    """Without a character that anybody takes for the end of a line."""
    line = written(content)
    if not line.isascii():
        for end, escaped in _LINE_ENDS:
            line = line.replace(end, escaped)
    return line
