"""An item of a response's output in the making: the events that tell of it, without their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pagewire.v1.inference_pb2 import TokenText

from pagewire_bridge.openai.responses.items import PREFIXES, Fields
from pagewire_bridge.openai.shapes import chat_logprobs
from pagewire_bridge.tools.calls import Arguments, Call, Piece, Thought


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
    kind = "function_call" if isinstance(piece, Call) else "reasoning" if isinstance(piece, Thought) else "message"
    item_id = f"{PREFIXES[kind]}_{suffix}_{index}"
    if isinstance(piece, Call):
        return CallItem(piece, index, item_id, called.get(piece.name, {"name": piece.name}))
    return TextItem(type(piece), index, item_id)


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
    """A call of a function."""

    def __init__(self, call: Call, index: int, item_id: str, name: Fields) -> None:
        item = {"id": item_id, "type": "function_call", "status": "in_progress", "call_id": call.id}
        super().__init__(index, {**item, **name, "arguments": ""})

    def takes(self, piece: Piece) -> bool:
        return isinstance(piece, Arguments)

    def begin(self) -> list[Fields]:
        return [self._added()]

    def add(self, piece: Piece, tokens: Sequence[TokenText]) -> list[Fields]:
        if not isinstance(piece, Arguments):
            return []
        self._texts.append(piece.text)
        return [self._inner("function_call_arguments.delta", delta=piece.text)]

    def end(self, status: str) -> list[Fields]:
        arguments = "".join(self._texts)
        name = self.item["name"]
        return [
            self._inner("function_call_arguments.done", arguments=arguments, name=name),
            self._done(status, arguments=arguments),
        ]


def _logprobs(tokens: Sequence[TokenText]) -> list[Fields]:
    found = chat_logprobs(tokens)
    return found["content"] if found else []
