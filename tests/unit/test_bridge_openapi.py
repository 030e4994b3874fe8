"""The OpenAPI document is of the routes that are there and of the models that validate, and Swagger UI shows it."""

from __future__ import annotations

import functools
import typing
from typing import Any

import httpx
import pytest
from openapi_spec_validator import validate
from pagewire_bridge.app import ROUTES, create_app
from pagewire_bridge.client import RouterClient
from pagewire_bridge.keys import load_keys
from pagewire_bridge.openapi.document import described, document
from pagewire_bridge.tokenize import TOKENIZER_INFO
from pagewire_core.errors import Unavailable
from pydantic import BaseModel
from scripted_router import Bridge, refuses, running_bridge

pytestmark = pytest.mark.asyncio(loop_scope="module")

Document = dict[str, Any]
_PATH_VALUES = {"conversation_id": "conv_x", "item_id": "x", "model": "demo", "version": "1"}


@functools.cache
def made(with_keys: bool = False) -> Document:
    return document(ROUTES, with_keys)


def without_tokenizer_info() -> Document:
    """What a bridge serves whose operator has not asked for that route."""
    return document([route for route in ROUTES if route is not TOKENIZER_INFO], False)


async def test_every_route_is_described_and_nothing_else_is() -> None:
    registered = {route.endpoint for route in ROUTES}
    undescribed = sorted(f"{e.__module__}.{e.__name__}" for e in registered - set(described()))
    assert not undescribed, f"say what these do in an operations.py: {undescribed}"
    assert set(described()) == registered


async def test_paths_and_methods_are_those_that_are_registered() -> None:
    documented = {(method.upper(), path) for path, methods in made()["paths"].items() for method in methods}
    registered = {
        (method, route.path_format)
        for route in ROUTES
        for method in (route.methods or set()) - {"HEAD"}
    }  # fmt: skip
    assert documented == registered


async def test_the_document_is_valid() -> None:
    validate(made(True))
    ids = [operation["operationId"] for path in made()["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)


async def test_every_error_that_an_operation_names_is_there() -> None:
    for path in made(True)["paths"].values():
        for operation in path.values():
            for status, response in operation["responses"].items():
                if "$ref" in response:
                    found = made(True)["components"]["responses"][response["$ref"].rpartition("/")[2]]
                    assert status in response["$ref"] and found["content"]["application/json"]["examples"]


async def test_documented_bodies_are_those_that_validate(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first model that each example meets is one that the document names, and every one that it names is met."""
    met: list[type[BaseModel]] = []
    model_validate = BaseModel.model_validate.__func__  # type: ignore[attr-defined]

    def recorded(model: type[BaseModel], fields: Any) -> BaseModel:
        met.append(model)
        validated: BaseModel = model_validate(model, fields)
        return validated

    bridge.router.script = refuses(Unavailable("not now"))
    monkeypatch.setattr(BaseModel, "model_validate", classmethod(recorded))
    num_bodies = 0
    for route in ROUTES:
        operation = described()[route.endpoint][1]
        if operation.body is None:
            continue
        firsts = set()
        for example in operation.examples.values():
            met.clear()
            await bridge.http.post(route.path_format.format(**_PATH_VALUES), json=example)
            firsts.add(met[0])
        assert firsts == (set(typing.get_args(operation.body)) or {operation.body}), route.path
        num_bodies += 1
    assert num_bodies > 20


async def test_the_bridge_serves_the_document_and_a_page_of_its_own(bridge: Bridge) -> None:
    assert (await bridge.http.get("/openapi.json")).json() == without_tokenizer_info()
    page = await bridge.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"] and "://" not in page.text
    for name, kind in (("swagger-ui-bundle.js", "javascript"), ("swagger-ui.css", "css"), ("docs.js", "javascript")):
        assert f'"docs/{name}"' in page.text
        file = await bridge.http.get(f"/docs/{name}")
        assert file.status_code == 200 and kind in file.headers["content-type"] and file.content
    assert (await bridge.http.get("/docs/other.js")).status_code == 404


async def test_under_a_prefix_every_route_answers_whether_or_not_a_proxy_takes_it_away() -> None:
    """`/api/chat` under `/api` is Ollama's: nobody could say which was meant."""
    async with running_bridge(root_path="/api") as bridge:
        http = bridge.http
        for prefix in ("", "/api"):
            assert (await http.get(f"{prefix}/v1/models")).json()["data"][0]["id"] == "demo"
            assert (await http.get(f"{prefix}/openapi.json")).json() == without_tokenizer_info() | {
                "servers": [{"url": "/api"}]
            }
            assert (await http.get(f"{prefix}/api/tags")).json()["models"]
            assert (await http.get(f"{prefix}/nowhere")).status_code == 404
            for page in ("/", ""):
                shown = await http.get(f"{prefix}{page}", headers={"accept": "text/html"})
                assert '"/api/page/page.js"' in shown.text and (await http.get("/api/page/page.js")).is_success
        assert "error" in (await http.post("/api/v1/messages", json={})).json(), "in Anthropic's shape"
        counts = (await http.get("/api/metrics")).text
        assert 'pagewire_bridge_requests_total{instance="bridge",route="/v1/models",status="200"} 2.0' in counts
        assert (await http.get("/apis/v1/models")).status_code == 404


async def test_a_server_without_docs_has_neither_the_document_nor_the_page() -> None:
    app = create_app(lambda: RouterClient("127.0.0.1:1", 1.0), with_docs=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bridge") as client:
        for path in ("/openapi.json", "/docs", "/docs/docs.js"):
            answer = await client.get(path)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


async def test_the_tokenizers_settings_are_told_where_the_operator_says_so(bridge: Bridge) -> None:
    assert (await bridge.http.get("/tokenizer_info")).json()["error"]["code"] == "not_found"
    async with running_bridge(with_tokenizer_info=True) as open_bridge:
        assert (await open_bridge.http.get("/openapi.json")).json() == made()


async def test_keys_are_asked_for_where_the_document_says_so() -> None:
    app = create_app(lambda: RouterClient("127.0.0.1:1", 1.0), keys=load_keys("secret", None))
    transport, unlocked = httpx.ASGITransport(app, raise_app_exceptions=False), set()  # without its state it fails
    async with httpx.AsyncClient(transport=transport, base_url="http://bridge") as client:
        for path, methods in made(True)["paths"].items():
            for method, operation in methods.items():
                values = {p["name"]: p["schema"].get("enum", ["x"])[0] for p in operation["parameters"] if "name" in p}
                status = (await client.request(method, path.format(**values))).status_code
                assert (status in (401, 403)) == bool(operation["security"])
                if operation["security"]:
                    assert str(status) in operation["responses"]
                else:
                    assert "401" not in operation["responses"]
                    unlocked.add(path)
    assert unlocked == {
        "/", "/health", "/ping", "/v2/health/live", "/page/{name}", "/openapi.json", "/docs", "/docs/{name}"
    }  # fmt: skip
