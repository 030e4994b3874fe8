"""An item of a response's output in the making: the events that tell of it, without their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pagewire.v1.inference_pb2 import TokenText

from pagewire_bridge.openai.responses.items import PREFIXES, Fields
from pagewire_bridge.openai.shapes import chat_logprobs
from pagewire_bridge.tools.calls import Arguments, Call, Input, Piece, Thought


class OutputItem(Protocol):
    """begin, add of each piece, end. item: what it is as of now, without its text until the end."""

    item: Fields

    def takes(self, piece: Piece) -> bool:
        """Whether the piece goes on with this item."""

    def begin(self) -> list[Fields]: ...

    def add(self, piece: Piece, tokens: Sequence[TokenText]) -> list[Fields]: ...

    def end(self, status: str) -> list[Fields]: ...


def output_item(piece: Piece, index: int, suffix: str, called: Mapping[str, Fields]) -> OutputItem:
    """The item that a piece begins. suffix: of its id, which tells the response that it is of. called: see tools.py."""
    if isinstance(piece, Call):
        item_id = f"{PREFIXES[_call_kind(piece)]}_{suffix}_{index}"
        return CallItem(piece, index, item_id, called.get(piece.name, {"name": piece.name}))
    kind = "reasoning" if isinstance(piece, Thought) else "message"
    return TextItem(type(piece), index, f"{PREFIXES[kind]}_{suffix}_{index}")


def _call_kind(call: Call) -> str:
    return "custom_tool_call" if call.custom else "function_call"


class _Item:
    def __init__(self, index: int, item: Fields) -> None:
        self.item = item
        self._index = index
        self._texts: list[str] = []

    def _event(self, kind: str, **fields: Any) -> Fields:
        return {"type": f"response.{kind}", "output_index": self._index, **fields}

    def _inner(self, kind: str, **fields: Any) -> Fields:
        return self._event(kind, item_id=self.item["id"], **fields)

    def _added(self) -> Fields:
        return self._event("output_item.added", item=self.item)

    def _done(self, status: str, **fields: Any) -> Fields:
        self.item = {**self.item, "status": status, **fields}
        return self._event("output_item.done", item=self.item)


class TextItem(_Item):
    """A message, or thoughts; of one part."""

    def __init__(self, kind: type[Piece], index: int, item_id: str) -> None:
        self._kind = kind
        self._logprobs: list[Fields] = []
        self._is_thought = kind is Thought
        self._name = "reasoning_text" if self._is_thought else "output_text"
        own: Fields = (
            {"type": "reasoning", "summary": []} if self._is_thought else {"type": "message", "role": "assistant"}
        )
        super().__init__(index, {"id": item_id, "status": "in_progress", **own, "content": []})

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, self._kind)

    def begin(self) -> list[Fields]:
        return [self._added(), self._inner("content_part.added", content_index=0, part=self._part("", []))]

    def add(self, piece: Piece, tokens: Sequence[TokenText]) -> list[Fields]:
        text = getattr(piece, "text", "")
        if not text:
            return []
        logprobs = _logprobs(tokens) if tokens else []
        self._texts.append(text)
        self._logprobs += logprobs
        more: Fields = {} if self._is_thought else {"logprobs": logprobs}
        return [self._inner(f"{self._name}.delta", content_index=0, delta=text, **more)]

    def end(self, status: str) -> list[Fields]:
        text = "".join(self._texts)
        more: Fields = {} if self._is_thought else {"logprobs": self._logprobs}
        part = self._part(text, self._logprobs)
        return [
            self._inner(f"{self._name}.done", content_index=0, text=text, **more),
            self._inner("content_part.done", content_index=0, part=part),
            self._done(status, content=[part]),
        ]

    def _part(self, text: str, logprobs: list[Fields]) -> Fields:
        more: Fields = {} if self._is_thought else {"annotations": [], "logprobs": logprobs}
        return {"type": self._name, "text": text, **more}


class CallItem(_Item):
    """A call of a function, or of a custom tool, whose input is told as a function's arguments are."""

    def __init__(self, call: Call, index: int, item_id: str, name: Fields) -> None:
        kind = _call_kind(call)
        self._field = "input" if call.custom else "arguments"
        self._name = f"{kind}_{self._field}"  # of its events
        item = {"id": item_id, "type": kind, "status": "in_progress", "call_id": call.id}
        super().__init__(index, {**item, **name, self._field: ""})

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, Arguments | Input)

    def begin(self) -> list[Fields]:
        return [self._added()]

    def add(self, piece: Piece, tokens: Sequence[TokenText]) -> list[Fields]:
        if not isinstance(piece, Arguments | Input):
            return []
        self._texts.append(piece.text)
        return [self._inner(f"{self._name}.delta", delta=piece.text)]

    def end(self, status: str) -> list[Fields]:
        whole = {self._field: "".join(self._texts)}
        named = {"name": self.item["name"]} if self._field == "arguments" else {}
        return [self._inner(f"{self._name}.done", **whole, **named), self._done(status, **whole)]


def _logprobs(tokens: Sequence[TokenText]) -> list[Fields]:
    found = chat_logprobs(tokens)
    return found["content"] if found else []
