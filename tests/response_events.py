"""The events of a response, read as a client reads them that trusts nothing but their order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Fields = dict[str, Any]
WEATHER: Fields = {"type": "function", "name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
TEXT = (
    '<think>\nWhich?\n</think>\n\nOk, ünd.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "R\\"ome"}}'
    '\n</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
ENDS = ("response.completed", "response.incomplete", "response.failed")


def in_parts(text: str, places: Sequence[int]) -> list[str]:
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(cuts)]


def read_back(events: Sequence[Fields], first: int = 0) -> Fields:
    """The last event's response, once what was told before adds up to its output. first: number of the first event."""
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    kinds = [event["type"] for event in events]
    begin = kinds.index("response.in_progress") + 1
    assert kinds[:begin] in (
        ["response.created", "response.in_progress"],
        ["response.created", "response.queued", "response.in_progress"],
    )
    assert kinds[-1] in ENDS and not set(kinds[begin:-1]) & set(ENDS)
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    rest, output = list(events[begin:-1]), list[Fields]()
    while rest:
        output.append(_item(rest, len(output)))
    final: Fields = events[-1]["response"]
    assert output == final["output"] and kinds[-1] == f"response.{final['status']}"
    assert len({item["id"] for item in output}) == len(output)
    return final


def _item(rest: list[Fields], index: int) -> Fields:
    """Takes one item's events; returns what it is in the end."""
    added = rest.pop(0)
    assert added["type"] == "response.output_item.added" and added["item"]["status"] == "in_progress"
    read = {"function_call": _call, "custom_tool_call": _custom_call}.get(added["item"]["type"], _text)
    inner: list[Fields] = []
    while rest[0]["type"] != "response.output_item.done":
        inner.append(rest.pop(0))
        assert inner[-1]["item_id"] == added["item"]["id"]
    done = rest.pop(0)
    assert {event["output_index"] for event in (added, *inner, done)} == {index}
    item = {**added["item"], "status": done["item"]["status"], **read(added["item"], inner)}
    assert item == done["item"]
    return item


def _text(item: Fields, inner: list[Fields]) -> Fields:
    name = {"message": "output_text", "reasoning": "reasoning_text"}[item["type"]]
    begin, *deltas, whole, end = inner
    assert begin["type"] == "response.content_part.added" and end["type"] == "response.content_part.done"
    assert {event["content_index"] for event in inner} == {0}
    assert all(event["type"] == f"response.{name}.delta" and event["delta"] for event in deltas)
    part = {**begin["part"], "text": begin["part"]["text"] + "".join(event["delta"] for event in deltas)}
    assert whole["type"] == f"response.{name}.done" and whole["text"] == part["text"]
    if name == "output_text":
        part["logprobs"] = [token for event in deltas for token in event["logprobs"]]
        assert whole["logprobs"] == part["logprobs"]
    assert part == end["part"] and item["content"] == []
    return {"content": [part]}


def _call(item: Fields, inner: list[Fields]) -> Fields:
    *deltas, whole = inner
    assert all(event["type"] == "response.function_call_arguments.delta" and event["delta"] for event in deltas)
    arguments = "".join(event["delta"] for event in deltas)
    assert whole["type"] == "response.function_call_arguments.done" and item["arguments"] == ""
    assert (whole["arguments"], whole["name"]) == (arguments, item["name"])
    return {"arguments": arguments}


def _custom_call(item: Fields, inner: list[Fields]) -> Fields:
    *deltas, whole = inner
    assert all(event["type"] == "response.custom_tool_call_input.delta" and event["delta"] for event in deltas)
    given = "".join(event["delta"] for event in deltas)
    assert whole["type"] == "response.custom_tool_call_input.done" and item["input"] == ""
    assert whole["input"] == given and "arguments" not in item
    return {"input": given}
