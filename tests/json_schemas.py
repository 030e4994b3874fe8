"""Random JSON schemas, of which most can be followed, and what a cluster makes of them."""

from __future__ import annotations

import json
from typing import Any

from cluster import Cluster
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

_NAMES = st.sampled_from(["a", "b", "name", "x-y", "é", 'q"', ""])
_JSON = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('abé"\\ ', max_size=4))


def _bounds(low: str, high: str, most: int) -> st.SearchStrategy[dict[str, Any]]:
    both = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return st.one_of(st.just({}), both.map(lambda b: {low: b[0], high: b[1]}), both.map(lambda b: {high: b[1]}))


def _merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda dicts: {key: value for part in dicts for key, value in part.items()})


def _leaves() -> st.SearchStrategy[Any]:
    patterns = st.sampled_from(["^[a-c]{1,3}$", "x", "^(ab|cd)+e?$", "\\d{2}", "^é", "(?!x)"])
    formats = st.sampled_from(["date", "uuid", "ipv4", "time", "odd"])
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        _merged(st.just({"type": "integer"}), _bounds("minimum", "maximum", 300)),
        _merged(st.just({"type": "number"}), _bounds("exclusiveMinimum", "exclusiveMaximum", 9)),
        _merged(st.just({"type": "string"}), _bounds("minLength", "maxLength", 6)),
        patterns.map(lambda p: {"type": "string", "pattern": p, "maxLength": 12}),
        formats.map(lambda f: {"type": "string", "format": f, "maxLength": 40}),
        st.lists(_JSON, min_size=1, max_size=4).map(lambda values: {"enum": values}),
        _JSON.map(lambda value: {"const": value}),
        st.just({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 90}),
        st.just({"type": ["integer", "null"]}),
    )


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def complete(parts: tuple[dict[str, Any], set[str], Any]) -> dict[str, Any]:
        properties, required, others = parts
        return {"type": "object", "properties": properties, "required": sorted(required), **others}

    others = st.sampled_from([{"additionalProperties": False}] * 4 + [{"additionalProperties": {"type": "boolean"}}])
    return st.tuples(st.dictionaries(_NAMES, inner, max_size=4), st.sets(_NAMES, max_size=2), others).map(complete)


def schemas() -> st.SearchStrategy[Any]:
    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        arrays = _merged(inner.map(lambda i: {"type": "array", "items": i}), _bounds("minItems", "maxItems", 3))
        tuples = st.lists(inner, min_size=1, max_size=3).map(
            lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        )
        unions = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
        exclusive = st.lists(inner, min_size=1, max_size=2).map(lambda options: {"oneOf": options})
        both = st.tuples(inner, inner).map(lambda pair: {"allOf": list(pair)})
        referring = inner.map(
            lambda i: {"$defs": {"d": i}, "type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 2}
        )
        return st.one_of(_objects(inner), arrays, tuples, unions, exclusive, both, referring)

    return st.recursive(_leaves(), larger, max_leaves=8)


async def instance_of(cluster: Cluster, schema: Any, seed: int) -> str:
    """What became of it. Raises AssertionError for anything but a valid instance, a 400 or one that was cut off."""
    body = {
        "messages": [{"role": "user", "content": "hello"}], "temperature": 1.0, "seed": seed, "max_tokens": 250,
        "structured_outputs": {"json": json.dumps(schema)},
    }  # fmt: skip
    response = await cluster.http.post("/v1/chat/completions", json=body)
    if response.status_code == 400:
        return response.json()["error"]["message"]
    assert response.status_code == 200, (schema, response.text)
    choice = response.json()["choices"][0]
    if choice["finish_reason"] == "length":
        return "cut off"
    Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
    return "valid"
