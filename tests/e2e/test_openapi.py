"""The OpenAPI document is true: real workers are asked everything that it shows as an example, and must answer as it
says; what they answer beyond it is a lie by omission.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from cluster import Cluster, running
from jsonschema import Draft202012Validator
from pagewire_bridge.app import ROUTES
from pagewire_cli.serve import demo_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

FLAGS = ("--kv-cache-memory-bytes=16M", "--max-model-len=512", "--threads=1")
REFERENCE = Path(__file__).parents[2] / "docs" / "api.md"
RESPONSE_ID = "resp_" + "0" * 32  # these stand for some that are there
CONVERSATION_ID, ITEM_ID = "conv_" + "0" * 32, "msg_" + "0" * 32 + "_in0"
CONVERSATION = {"conversation_id": CONVERSATION_ID, "item_id": ITEM_ID}
Document = dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("openapi")
    made = Cluster(
        demo_model(),
        directory,
        worker_flags=FLAGS,
        router_flags=("--served-model-name=demo",),
        bridge_flags=("--tool-call-parser=json", "--enable-auto-tool-choice", "--enable-tokenizer-info-endpoint"),
    )
    async with running(made) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def document(cluster: Cluster) -> Document:
    """With closed objects: an answer may have no key that is not in the document."""
    document: Document = (await cluster.http.get("/openapi.json")).json()
    for schema in document["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return document


def operations(document: Document) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            values = {"model": "demo", "version": "1", "name": _first_name(operation), "response_id": RESPONSE_ID}
            yield path.format(**values, **CONVERSATION), method, operation


def _first_name(operation: dict[str, Any]) -> str:
    return next((p["schema"]["enum"][0] for p in operation["parameters"] if p.get("name") == "name"), "")


def bodies(operation: dict[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {})
    return {name: one["value"] for name, one in content.get("application/json", {}).get("examples", {}).items()}


def conforms(document: Document, operation: dict[str, Any], response: httpx.Response) -> None:
    """The status, the media type, the body or all items of it, and the headers are in the document."""
    documented = operation["responses"].get(str(response.status_code))
    assert documented, f"{response.url} gave {response.status_code}: {response.text}"
    if "$ref" in documented:
        documented = document["components"]["responses"][documented["$ref"].rpartition("/")[2]]
    ours = {name for name in response.headers if name.startswith("x-") and name != "x-content-type-options"}
    ours -= {"x-accel-buffering"}
    assert ours <= set(documented.get("headers", {})), response.url
    if not documented.get("content"):
        assert not response.content
        return
    media_type = response.headers["content-type"].partition(";")[0]
    schema = documented["content"][media_type]["schema"]
    for item in items(media_type, response.text):
        Draft202012Validator({**schema, "components": document["components"]}).validate(item)
        if media_type == "text/event-stream" and item["data"] != "[DONE]":
            data = schema["properties"]["data"]
            content = data.get("anyOf", [data])[0]["contentSchema"]
            Draft202012Validator({**content, "components": document["components"]}).validate(json.loads(item["data"]))


def items(media_type: str, text: str) -> list[Any]:
    if media_type == "application/json":
        return [json.loads(text)]
    if media_type == "application/x-ndjson":
        return [json.loads(line) for line in text.splitlines()]
    if media_type == "text/event-stream":
        return [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.split("\n\n") if event]
    return [text]


async def stored_response(cluster: Cluster) -> str:
    """Its id; of one that may be cancelled."""
    asked = {"input": "Hi", "max_output_tokens": 2, "background": True}
    return str((await cluster.http.post("/v1/responses", json=asked)).json()["id"])


async def stored_conversation(cluster: Cluster) -> tuple[str, str]:
    """Its id, and that of its item."""
    made = (await cluster.http.post("/v1/conversations", json={"items": [{"role": "user", "content": "Hi"}]})).json()
    listed = (await cluster.http.get(f"/v1/conversations/{made['id']}/items")).json()
    return made["id"], listed["data"][0]["id"]


async def test_every_example_is_answered_as_the_document_says(cluster: Cluster, document: Document) -> None:
    media_types = set[str]()
    for path, method, operation in operations(document):
        for name, body in (bodies(operation) or {"": None}).items():
            if RESPONSE_ID in path:
                path = path.replace(RESPONSE_ID, await stored_response(cluster))
            if CONVERSATION_ID in path:
                conversation, item = await stored_conversation(cluster)
                path = path.replace(CONVERSATION_ID, conversation).replace(ITEM_ID, item)
            response = await cluster.http.request(method, path, json=body)
            refused = "403" in operation["responses"]  # what needs an administrator's key
            assert response.status_code == (403 if refused else 200), f"{path}, {name}: {response.text}"
            conforms(document, operation, response)
            media_types.add(response.headers.get("content-type", "").partition(";")[0])
    assert {"application/json", "text/event-stream", "application/x-ndjson", "text/plain", ""} <= media_types
    await cluster.settle()


async def test_a_request_may_bring_no_template_unless_the_server_says_so(cluster: Cluster) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "chat_template": "{{ messages[0].content }}"}
    for path, status in {"/v1/chat/completions": 400, "/tokenize": 400, "/chat_tokenize": 422}.items():
        refused = await cluster.http.post(path, json=fields)
        assert refused.status_code == status and "--trust-request-chat-template" in refused.text, path


async def test_every_command_of_the_reference_runs(cluster: Cluster) -> None:
    """docs/api.md in a shell: every route is asked as it is shown there, and answers 200."""
    if shutil.which("bash") is None or shutil.which("curl") is None:
        pytest.skip("there is no bash or no curl")
    blocks = re.findall(r"^```\n(.*?)^```", REFERENCE.read_text(), re.DOTALL | re.MULTILINE)
    told = "%{stderr}%{http_code} %{method} %{url_effective}\\n"
    script = "\n".join(
        [f'curl() {{ command curl -sS -w "{told}" "$@"; }}', *(block for block in blocks if block.startswith("curl"))]
    )
    environment = {**os.environ, "URL": str(cluster.http.base_url).rstrip("/"), "ADMIN_KEY": "none"}
    bash = await asyncio.create_subprocess_exec(
        "bash", "-euc", script.replace("pagewire-demo", "demo"), env=environment,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await bash.communicate()
    assert bash.returncode == 0, said.decode()
    asked = [line.split(" ", 2) for line in said.decode().splitlines()]
    for status, method, url in asked:
        admin = url.endswith(("/reset_prefix_cache", "/server_info"))
        assert status == ("403" if admin else "200"), f"{method} {url}: {status}"
    paths = {(method, url.removeprefix(environment["URL"]).split("?")[0]) for _, method, url in asked}
    unasked = [
        (method, route.path)
        for route in ROUTES
        for method in (route.methods or set()) - {"HEAD"}
        if not any(method == m and route.path_regex.fullmatch(path) for m, path in paths)
    ]
    assert not unasked
    await cluster.settle()


async def test_nonsense_is_refused_as_the_document_says(cluster: Cluster, document: Document) -> None:
    num_refusals = 0
    for path, method, operation in operations(document):
        if not bodies(operation):
            continue
        for body in ("", "[]", '"x"', "{", '{"model": 1, "inputs": 1, "prompt": {}, "messages": 1}'):
            response = await cluster.http.request(method, path, content=body)
            if path == "/v1/conversations" and body.startswith('{"'):  # of which every field may be absent
                assert response.headers["x-pagewire-ignored-fields"] == "inputs,messages,model,prompt"
                continue
            assert 400 <= response.status_code < 500, f"{path} {body}: {response.text}"
            conforms(document, operation, response)
            num_refusals += 1
    assert num_refusals > 100


async def test_other_methods_are_refused_with_those_that_are_there(cluster: Cluster, document: Document) -> None:
    for path, methods in document["paths"].items():
        path = path.format(model="demo", version="1", name="x", response_id=RESPONSE_ID, **CONVERSATION)
        response = await cluster.http.request("PATCH", path)
        if response.status_code == 403:  # administrators alone are told more
            continue
        allowed = {m.strip().lower() for m in response.headers["allow"].split(",")} - {"head"}
        assert response.status_code == 405 and allowed == set(methods)
