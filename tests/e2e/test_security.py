"""The HTTP side of a system that trusts nobody: keys, tenants and whatever a client may send, with TLS everywhere.

`test_tls.py` has the ports between services. Routes come from the application's own table: a new one is asked, too.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import certificates
import httpx
import pytest
import pytest_asyncio
from cluster import ANSWER_S, PAIRS, SMALL, Cluster, running
from pagewire.v1 import worker_pb2, worker_pb2_grpc
from pagewire_bridge.access import is_open
from pagewire_bridge.app import ROUTES
from pagewire_bridge.body import MAX_BODY_BYTES
from pagewire_bridge.keys import digest_of
from strangers import PREFACE, say
from streams import prompt_of
from tiny_models import reference_greedy

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Key -> tenant. The last one may do what administrators may.
KEYS = {"sesame-alice": "a", "sesame-carol": "a", "sesame-bob": "b", "sesame-root": "root"}
ALICE, CAROL, BOB, ROOT = ({"authorization": f"Bearer {key}"} for key in KEYS)
SECRET = "The fox hid the silver key under the third stone. " * 3  # Alice's, 150 tokens
# What has no data of its own. Whoever adds a route here has thought about it.
OPEN = {("GET", "/"), ("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"), ("GET", "/v2/health/live"),
        ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/docs/x"), ("GET", "/page/x")}  # fmt: skip
ABSENT, NO_CONVERSATION = "resp_" + "0" * 32, "conv_" + "0" * 32


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory = tmp_path_factory.mktemp("secured")
    file = directory / "keys.yaml"
    entries = (
        {"name": f"key-{i}", "tenant": tenant, "sha256": digest_of(key), "admin": tenant == "root"}
        for i, (key, tenant) in enumerate(KEYS.items())
    )
    file.write_text(json.dumps(list(entries)))
    made = Cluster(llama, directory, worker_flags=(*SMALL, "--lanes=tcp"), router_flags=PAIRS, https=True,
                   bridge_flags=(f"--api-keys-file={file}",), tls=certificates.made(directory / "tls"))  # fmt: skip
    async with running(made) as it:
        it.http.headers.update(ROOT)  # for what is checked at the end
        yield it
        logs = "".join(p.log.read_text() for p in it.processes.values())
        assert "Traceback" not in logs and "failed in the bridge" not in logs, logs[-3000:]
        assert "sesame" not in logs and "silver" not in logs


@pytest_asyncio.fixture(loop_scope="module")
async def nobody(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key; whatever it did, the system is well after it."""
    async with cluster.client() as http:
        yield http
    prompt = prompt_of(40, 1)
    answer = await cluster.complete(prompt, ignore_eos=True)
    assert answer["choices"][0]["token_ids"] == reference_greedy(cluster.model, prompt, 12)[0]
    await cluster.settle()


def routes(response_id: str = ABSENT, conversation_id: str = NO_CONVERSATION) -> Iterator[tuple[str, str]]:
    """Method and path of everything that the bridge answers."""
    values = {"model": "m", "version": "1", "name": "x", "item_id": "x"}
    values |= {"response_id": response_id, "conversation_id": conversation_id}
    for route in ROUTES:
        path = route.path_format.format(**values)
        yield from ((method, path) for method in sorted(route.methods or ()) if method != "HEAD")


# ---------------------------------------------------------------- keys


async def test_no_route_is_open_without_a_key(nobody: httpx.AsyncClient) -> None:
    """401 before anything else, also for a body that is said to be large and never comes."""
    asked = sorted(set(routes()))
    assert {(method, path) for method, path in asked if is_open(path, method)} == OPEN
    for method, path in asked:
        for headers in (
            {}, {"authorization": "Bearer sesame-alic"}, {"authorization": "sesame-alice"}, {"x-api-key": "sesame"},
            {"authorization": "Basic sesame-alice"}, {"cookie": "key=sesame-alice"},
        ):  # fmt: skip
            answer = await nobody.request(method, path, headers=headers, content=b"{" if method == "POST" else None)
            if (method, path) in OPEN:
                assert answer.status_code in (200, 404)
            elif path in ("/reset_prefix_cache", "/server_info"):
                assert answer.status_code == 403
            else:
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
                assert "error" in answer.json() or answer.json()["type"] == "error"


async def test_nobody_gets_past_the_key_by_another_way_to_write_a_path(cluster: Cluster, nobody: Any) -> None:
    """Sent as they are: clients would tidy them up."""
    tricks = (
        "/docs/../v1/models", "/page/../v1/models", "/page/%2e%2e/v1/models", "/docs/..%2fv1/models", "//v1/models",
        "/v1//models", "/V1/models", "/v1/models/", "/health/../v1/models", "/health;/../v1/models", "/v1/models%00",
        "/v1/models?x=/health", "/v1/models#/health", "/%76%31/models", "https://localhost/v1/models",
        "/ping%2f..%2fload", "/health%3f/../../metrics", "/docs/%2e%2e/metrics", "/page/..%5cmetrics",
    )  # fmt: skip
    asked = [(method, path) for path in tricks for method in (b"GET", b"OPTIONS", b"GETT", b"get")]
    heads = (b"%s %s HTTP/1.1\r\n" % (method, path.encode()) for method, path in asked)
    for one, answer in zip(asked, await asyncio.gather(*(http_says(cluster, head) for head in heads)), strict=True):
        assert int(answer.split()[1]) in (400, 401, 404, 405), (one, answer)
        assert b"owned_by" not in answer and b"pagewire_" not in answer, one


async def http_says(cluster: Cluster, words: bytes, key: str = "", limit_s: float = 10) -> bytes:
    """What is answered to these bytes; the head's end, the key and a wish to close are added where they are missing."""
    context = ssl.create_default_context(cafile=str(cluster.tls) + "/ca.crt")
    if words.endswith(b"\r\n") and not words.endswith(b"\r\n\r\n"):
        given = b"authorization: Bearer %s\r\n" % key.encode() if key else b""
        words += b"host: localhost\r\nconnection: close\r\n" + given + b"\r\n"
    return await say(int(cluster.base_url.rpartition(":")[2]), words, context, limit_s=limit_s)


# ---------------------------------------------------------------- tenants


async def test_another_tenants_responses_do_not_exist_on_any_route(nobody: httpx.AsyncClient) -> None:
    """The answer is the one that an id gets which nobody ever had; the owner's colleague still finds everything."""
    ask = {"input": SECRET, "max_output_tokens": 4, "temperature": 0}
    kept = (await nobody.post("/v1/responses", json=ask, headers=ALICE)).json()
    runs = (await nobody.post("/v1/responses", headers=ALICE, json={**ask, "background": True, "stream": True})).text
    name = json.loads(runs.partition("data: ")[2].partition("\n")[0])["response"]["id"]
    for mine in (kept["id"], name):
        concerned = [(m, p) for m, p in routes(mine) if mine in p]
        assert len(concerned) >= 4
        for method, path in concerned:
            for query in ("", "?stream=true&starting_after=0"):
                theirs = await nobody.request(method, path + query, headers=BOB)
                never = await nobody.request(method, path.replace(mine, ABSENT) + query, headers=BOB)
                assert theirs.status_code == never.status_code == 404, path
                assert theirs.text.replace(mine, ABSENT) == never.text
        for more in ({"previous_response_id": mine}, {"input": [{"type": "item_reference", "id": item_of(kept)}]}):
            refused = await nobody.post("/v1/responses", json={**ask, **more}, headers=BOB)
            assert refused.status_code == 400 and "silver" not in refused.text
        found = await nobody.get(f"/v1/responses/{mine}", headers=CAROL)
        assert found.json()["status"] in ("completed", "incomplete") and found.json()["output"]


async def test_another_tenants_conversations_do_not_exist_on_any_route(nobody: httpx.AsyncClient) -> None:
    items = {"items": [{"role": "user", "content": SECRET}]}
    mine = (await nobody.post("/v1/conversations", json=items, headers=ALICE)).json()["id"]
    concerned = [(method, path) for method, path in routes(conversation_id=mine) if mine in path]
    assert len(concerned) == 7
    for method, path in concerned:
        body = ({} if path.endswith("/items") else {"metadata": {}}) | items if method == "POST" else None
        theirs = await nobody.request(method, path, headers=BOB, json=body)
        never = await nobody.request(method, path.replace(mine, NO_CONVERSATION), headers=BOB, json=body)
        assert theirs.status_code == never.status_code == 404, (method, path)
        assert theirs.text.replace(mine, NO_CONVERSATION) == never.text
    ask = {"input": "What was it?", "max_output_tokens": 4, "temperature": 0}
    for fields in ({"conversation": mine}, {"conversation": {"id": mine}}):
        refused = await nobody.post("/v1/responses", json={**ask, **fields}, headers=BOB)
        assert refused.status_code == 404 and "silver" not in refused.text
    assert (await nobody.post("/v1/responses", json={**ask, "conversation": mine}, headers=CAROL)).status_code == 200
    found = (await nobody.get(f"/v1/conversations/{mine}/items", headers=ALICE)).json()["data"]
    assert [item["type"] for item in found] == ["message"] * 3, "the secret, the question and its answer"


def item_of(response: dict[str, Any]) -> str:
    return str(response["output"][0]["id"])


def questions() -> dict[str, dict[str, Any]]:
    """One way to have a long prompt computed, of every API; each another prompt."""
    chat = lambda api: [{"role": "user", "content": f"{api}: {SECRET}"}]  # noqa: E731
    return {
        "/v1/completions": {"prompt": f"completions: {SECRET}", "max_tokens": 2},
        "/v1/chat/completions": {"messages": chat("chat"), "max_tokens": 2},
        "/v1/responses": {"input": f"responses: {SECRET}", "max_output_tokens": 2},
        "/v1/embeddings": {"input": f"embeddings: {SECRET}"},
        "/v1/messages": {"model": "tgi", "messages": chat("messages"), "max_tokens": 2},
        "/generate": {"inputs": f"generate: {SECRET}", "parameters": {"max_new_tokens": 2}},
        "/api/generate": {"model": "tgi", "prompt": f"ollama: {SECRET}", "options": {"num_predict": 2}},
        "/api/chat": {"model": "tgi", "messages": chat("ollama's chat"), "options": {"num_predict": 2}},
        "/api/embed": {"model": "tgi", "input": f"embed: {SECRET}"},
        "/score": {"text_1": f"score: {SECRET}", "text_2": "x"},
    }


async def cached_tokens(cluster: Cluster) -> float:
    """That the workers have ever found in their caches instead of computing them."""
    found = 0.0
    for process in cluster.workers:
        async with cluster.channel(process) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            text = (await stub.Metrics(worker_pb2.WorkerServiceMetricsRequest(), timeout=ANSWER_S)).text
        found += float(text.partition("\npagewire_engine_prompt_tokens_cached_total ")[2].partition("\n")[0])
    return found


async def test_what_one_tenant_has_computed_saves_another_nothing(cluster: Cluster, nobody: httpx.AsyncClient) -> None:
    """A shared cache tells by its speed what others have asked (CVE-2025-46570). One's own tenant's is to help."""

    for path, body in questions().items():
        salted = ({}, {"cache_salt": "a"}) if path.startswith("/v1/c") else ({},)
        expected = await cached_tokens(cluster)
        for who, more in ((ALICE, {}), *((BOB, salt) for salt in salted)):
            answer = await nobody.post(path, json={**body, **more}, headers=who)
            assert answer.status_code == 200, answer.text
            assert await cached_tokens(cluster) == expected, (path, who)
        assert (await nobody.post(path, json=body, headers=CAROL)).status_code == 200
        assert await cached_tokens(cluster) > expected, "the test would not notice a shared cache"
    assert (await nobody.post("/reset_prefix_cache", headers=ALICE)).status_code == 403
    assert (await nobody.post("/reset_prefix_cache", headers=ROOT)).status_code == 200


async def test_administrators_alone_see_the_flags_and_nobody_sees_a_secret(nobody: httpx.AsyncClient) -> None:
    assert (await nobody.get("/server_info", headers=ALICE)).status_code == 403
    answer = await nobody.get("/server_info", headers=ROOT)
    told = answer.json()
    assert told["bridge"]["request-timeout"] and told["router"]["routing-policy"] == "prefix"
    assert {flags["role"] for flags in told["workers"].values()} == {"prefill", "decode"}
    assert "sesame" not in answer.text and "api-key" not in told["bridge"]


async def test_a_request_id_that_two_tenants_use_binds_neither_to_the_other(nobody: httpx.AsyncClient) -> None:
    """One leaves; the other's stream goes on, with its own tokens."""
    shared = {"x-request-id": "the-same"}
    fields = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
    whole = {**fields, "prompt": prompt_of(50, 1), "stream": False}
    expected = (await nobody.post("/v1/completions", json=whole, headers=ALICE)).json()["choices"][0]["text"]
    asked = {**fields, "prompt": prompt_of(50, 2), "max_tokens": 190}
    async with nobody.stream("POST", "/v1/completions", json=asked, headers=BOB | shared) as leaves:
        left = leaves.aiter_lines()  # kept: it would be closed with nobody to hold it, before its time
        await anext(left)
        own = {**fields, "prompt": prompt_of(50, 1)}
        async with nobody.stream("POST", "/v1/completions", json=own, headers=ALICE | shared) as stays:
            lines = stays.aiter_lines()
            told = [await anext(lines)]
            await leaves.aclose()
            told += [line async for line in lines]
    events = [line.removeprefix("data: ") for line in told if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected


# ---------------------------------------------------------------- what clients send

JSON_POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer sesame-alice\r\n"
SMUGGLED = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer sesame-alice\r\n\r\n"
# What a client says, and the statuses of which one is answered; none: the connection just ends.
BENT: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "two lengths": (JSON_POST + b"content-length: 2\r\ncontent-length: 200\r\n\r\n{}" + SMUGGLED, (400,)),
    "length and chunks": (
        JSON_POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED, (400,)),
    "an encoding that is none": (JSON_POST + b"transfer-encoding: chunked, x\r\n\r\n0\r\n\r\n" + SMUGGLED, (400,)),
    "a length with a sign": (JSON_POST + b"content-length: +2\r\n\r\n{}", (400,)),
    "a chunk that is no number": (JSON_POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", (400,)),
    "a chunk without end": (JSON_POST + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}", (400,)),
    "a folded header": (JSON_POST + b"a: b\r\n c: d\r\ncontent-length: 2\r\n\r\n{}", (400,)),
    "a space before the colon": (JSON_POST + b"content-length : 2\r\n\r\n{}", (400,)),
    "a zero byte in a header": (JSON_POST + b"a: \0\r\ncontent-length: 2\r\n\r\n{}", (400,)),
    "headers without end": (JSON_POST + b"a: " + b"x" * (80 << 10), (431,)),
    "a body without its end": (JSON_POST + b"content-length: 100\r\n\r\n{", ()),
    "HTTP/2": (PREFACE + bytes(64), (400,)),
    "another version": (b"GET /health HTTP/9.9\r\n\r\n", (400, 505)),
    "bytes": (bytes(range(256)) * 8, (400,)),
    "no UTF-8": (JSON_POST + b"connection: close\r\ncontent-length: 14\r\n\r\n" + b'{"prompt":"\xff"}', (400,)),
    "depth": (JSON_POST + b"connection: close\r\ncontent-length: 100000\r\n\r\n" + b"[" * 100_000, (400,)),
}  # fmt: skip


async def test_bent_requests_are_refused_and_hide_no_second_one(cluster: Cluster, nobody: httpx.AsyncClient) -> None:
    asked = (http_says(cluster, words, limit_s=10 if statuses else 0.3) for words, statuses in BENT.values())
    answers = await asyncio.gather(*asked)
    for (name, (_, statuses)), answer in zip(BENT.items(), answers, strict=True):
        assert answer.count(b"HTTP/1.1 ") == bool(statuses), (name, answer)
        assert not statuses or int(answer.split()[1]) in statuses, (name, answer)
        assert b"pagewire_" not in answer, name


async def test_a_body_beyond_the_limit_is_refused_on_every_route(cluster: Cluster, nobody: httpx.AsyncClient) -> None:
    """By its declared length, before a byte of it is sent; and when more comes than may, where no length was told."""
    for path in sorted({path for method, path in routes() if method == "POST"}):
        head = f"POST {path} HTTP/1.1\r\ncontent-length: {MAX_BODY_BYTES + 1}\r\n".encode()
        for key, expected in (("", 401), ("sesame-root", 413)):
            status = int((await http_says(cluster, head, key)).split()[1])
            without_body = ("/ping", "/reset_prefix_cache", f"/v1/responses/{ABSENT}/cancel")
            assert status == expected or (path in without_body and status in (200, 403, 404)), (path, key, status)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 1):
            yield bytes(1 << 20)

    assert (await nobody.post("/v1/completions", content=endless(), headers=ALICE)).status_code == 413
