"""The OpenAPI document: made of the routes that are there, the models that validate, and what `operations.py` of each
API says.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pagewire_core.errors import InvalidRequest, Overloaded
from pydantic import TypeAdapter
from pydantic.json_schema import CoreModeRef, CoreRef, DefsRef, GenerateJsonSchema
from starlette.routing import Route

from pagewire_bridge.access import is_for_administrators, is_open
from pagewire_bridge.anthropic.operations import API as ANTHROPIC
from pagewire_bridge.ollama.operations import API as OLLAMA
from pagewire_bridge.openai.conversations.operations import API as CONVERSATIONS
from pagewire_bridge.openai.operations import API as OPENAI
from pagewire_bridge.openai.responses.operations import API as RESPONSES
from pagewire_bridge.openapi import errors, headers
from pagewire_bridge.openapi.operation import DONE, EVENTS, JSON, Api, Endpoint, Operation, Raises
from pagewire_bridge.openapi.server import API as SERVER
from pagewire_bridge.tgi.operations import API as TGI

APIS: tuple[Api, ...] = (OPENAI, RESPONSES, CONVERSATIONS, TGI, OLLAMA, ANTHROPIC, SERVER)

Fields = dict[str, Any]
_Mode = Literal["validation", "serialization"]

_PREFIXES = {"openai": "OpenAI", "tgi": "TGI", "ollama": "Ollama", "anthropic": "Anthropic"}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's, TGI's and Ollama's clients do."},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "As Anthropic's clients do."},
}
_ANY_KEY: list[dict[str, list[str]]] = [{name: []} for name in _SECURITY]
_PARAMETER = re.compile(r"\{(\w+)(:\w+)?\}")


def described() -> dict[Endpoint, tuple[Api, Operation]]:
    return {endpoint: (api, operation) for api in APIS for endpoint, operation in api.operations.items()}


def document(routes: Iterable[Route], with_keys: bool, root_path: str = "") -> Fields:
    """Of OpenAPI 3.1. with_keys: whether clients are asked for API keys. root_path: before every path."""
    known = described()
    found = [
        (route.path, method, *known[route.endpoint])
        for route in routes
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]
    schemas = _Schemas((path, operation) for path, _, _, operation in found)
    paths: dict[str, Fields] = {}
    for path, method, api, operation in found:
        entry = paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})
        entry[method.lower()] = {
            "operationId": _operation_id(method, path),
            "tags": [api.name],
            **_described(path, method, operation, schemas, with_keys),
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pagewire",
            "version": version("pagewire"),
            "description": "Every API of one bridge. Bodies are JSON whatever their content type says; what answers "
            "GET answers HEAD, too.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        **({"servers": [{"url": root_path}]} if root_path else {}),
        "tags": [{"name": api.name, "description": api.description} for api in APIS],
        "paths": paths,
        "components": {
            "schemas": schemas.definitions,
            "responses": errors.to_components(schemas.of),
            "headers": headers.to_components(),
            "parameters": {"RequestId": headers.REQUEST_ID},
            "securitySchemes": _SECURITY,
        },
    }


def _operation_id(method: str, path: str) -> str:
    return "_".join([method.lower(), *re.findall(r"\w+", _PARAMETER.sub(r"\1", path))])


def _described(path: str, method: str, operation: Operation, schemas: _Schemas, with_keys: bool) -> Fields:
    needs_key = with_keys and not is_open(path, method)
    admin = is_for_administrators(path)
    refuses = {
        *operation.refuses,
        *((408, 413) if operation.body else ()),
        *((401,) if needs_key else ()),
        *((403,) if admin else ()),
    }
    said: Fields = {"summary": operation.summary, "parameters": _parameters(path, operation)}
    if operation.body:
        content = {"schema": schemas.of(operation.body, "validation"), "examples": _examples(operation.examples)}
        said["requestBody"] = {"required": True, "content": {JSON: content}}
    said["security"] = _ANY_KEY if needs_key or admin else []
    said["responses"] = {
        "200": _answer(operation, schemas, with_keys and needs_key),
        **{str(status): _json(kind, schemas) for status, kind in operation.statuses.items()},
        **errors.error_responses(path, _raises(operation, needs_key), sorted(refuses)),
    }
    return said


def _raises(operation: Operation, limited: bool) -> Raises:
    """A key's limits refuse as a full queue does."""
    of_body: Raises = (InvalidRequest,) if operation.body else ()
    of_key: Raises = (Overloaded,) if limited else ()
    return tuple(dict.fromkeys((*of_body, *operation.raises, *of_key)))


def _parameters(path: str, operation: Operation) -> list[Fields]:
    parameters: list[Fields] = []
    for name, _ in _PARAMETER.findall(path):
        values = operation.path_values.get(name)
        schema = {"type": "string", **({"enum": [*values]} if values else {"minLength": 1})}
        parameters.append({"name": name, "in": "path", "required": True, "schema": schema})
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    return [*parameters, {"$ref": "#/components/parameters/RequestId"}]


def _examples(examples: Mapping[str, Any]) -> Fields:
    return {name: {"value": value} for name, value in examples.items()}


def _answer(operation: Operation, schemas: _Schemas, limited: bool) -> Fields:
    names = ("x-request-id", *operation.headers, *(headers.RATE_LIMITS if limited else ()))
    said: Fields = {"description": operation.summary, "headers": headers.refer(names)}
    if operation.content:
        said["content"] = {
            media_type: _media(media_type, kind, schemas) for media_type, kind in operation.content.items()
        }
    return said


def _media(media_type: str, kind: Any, schemas: _Schemas) -> Fields:
    """3.1 has no word for the items of a stream: its schema is that of each event, or each line."""
    return {"schema": _event(kind, schemas) if media_type == EVENTS else schemas.of(kind)}


def _event(kind: Any, schemas: _Schemas) -> Fields:
    """As OpenAPI 3.2 writes events: their data is text, which here is JSON but for OpenAI's last."""
    json, ends = _without_done(kind)
    data: Fields = {"type": "string", "contentMediaType": JSON, "contentSchema": schemas.of(json)}
    data = {"anyOf": [data, {"const": get_args(DONE)[0]}]} if ends else data
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}


def _without_done(kind: Any) -> tuple[Any, bool]:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    json = [member for member in members if member != DONE]
    return functools.reduce(operator.or_, json), len(json) < len(members)


def _json(kind: Any, schemas: _Schemas) -> Fields:
    return {"description": "Not now.", "content": {JSON: {"schema": schemas.of(kind)}}}


class _Generator(GenerateJsonSchema):
    """Names carry their API, as several have a ChatBody; fields have no titles that only repeat their names."""

    def get_defs_ref(self, core_mode_ref: CoreModeRef) -> DefsRef:
        core_ref, mode = core_mode_ref
        return super().get_defs_ref((CoreRef(_prefixed(core_ref)), mode))

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _prefixed(core_ref: str) -> str:
    package, _, rest = core_ref.removeprefix("pagewire_bridge.").partition(".")
    return _PREFIXES.get(package, "") + rest.rpartition(".")[2]


class _Schemas:
    """All types of a document at once, so that each has one name in it."""

    def __init__(self, operations: Iterable[tuple[str, Operation]]) -> None:
        wanted: dict[tuple[str, _Mode], Any] = {}
        for path, operation in operations:
            kinds = (*operation.content.values(), *operation.statuses.values(), errors.error_type(path))
            kinds = tuple(_without_done(kind)[0] for kind in kinds)
            wanted |= {(str(kind), "serialization"): kind for kind in kinds}
            wanted |= {(str(operation.body), "validation"): operation.body} if operation.body else {}
        self._of, found = TypeAdapter.json_schemas(
            [(name, mode, TypeAdapter(kind)) for (name, mode), kind in wanted.items()],
            ref_template="#/components/schemas/{model}",
            schema_generator=_Generator,
        )
        self.definitions: Fields = found.get("$defs", {})
        for definition in self.definitions.values():
            definition.pop("title", None)  # the name without its API

    def of(self, kind: Any, mode: _Mode = "serialization") -> Fields:
        return self._of[str(kind), mode]
