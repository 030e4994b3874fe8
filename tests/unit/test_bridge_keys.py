"""API keys: who may ask, how often, and in whose name; over real HTTP, with limits in a real Redis."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from cluster import free_port
from pagewire_bridge.app import create_app
from pagewire_bridge.client import RouterClient
from pagewire_bridge.keys import ApiKey, KeyRing, digest_of, load_keys
from pagewire_bridge.main import build_server, listen
from pagewire_bridge.rate_limit import RateLimiter
from pagewire_cli.main import main
from pagewire_core.errors import Overloaded, StartupError
from pagewire_core.redis_link import open_redis
from scripted_router import ScriptedRouter, running_router

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
ALICE = ApiKey(name="alice", sha256=digest_of("alice-secret"), tenant="team")
BOB = ApiKey(name="bob", sha256=digest_of("bob-secret"), requests_per_minute=3, tokens_per_minute=1000)
ROOT = ApiKey(name="root", sha256=digest_of("root-secret"), admin=True)


@asynccontextmanager
async def bridge(
    keys: KeyRing, redis_url: str | None = None, allowed_origins: Sequence[str] = ()
) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedRouter]]:
    router = ScriptedRouter()
    async with running_router(router) as (_, address):
        listener = listen("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(
            lambda: RouterClient(address, 30), keys=keys, redis_url=redis_url, allowed_origins=allowed_origins
        )
        server = build_server(app)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            yield http, router
        server.should_exit = True
        await serving


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def test_a_refusal_has_the_shape_of_the_api_and_reaches_no_router() -> None:
    """tests/e2e/test_security.py asks every route, with every kind of wrong key."""
    async with bridge(KeyRing([ALICE])) as (http, router):
        for path in ("/v1/chat/completions", "/generate", "/api/chat", "/v1/messages", "/nowhere"):
            response = await http.post(path, headers=bearer("wrong"), json=CHAT)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert (await http.post("/v1/chat/completions", json=CHAT)).json()["error"]["code"] == "invalid_api_key"
        assert (await http.post("/v1/messages")).json()["error"]["type"] == "authentication_error"
        for path in ("/health", "/ping", "/", "/v2/health/live"):
            assert (await http.get(path)).status_code == 200
        assert not router.requests


async def test_a_request_carries_the_tenant_of_its_key_and_not_of_its_body() -> None:
    async with bridge(KeyRing([ALICE, BOB])) as (http, router):
        for headers in (bearer("alice-secret"), {"x-api-key": "bob-secret"}):
            response = await http.post("/v1/chat/completions", json={**CHAT, "tenant": "other"}, headers=headers)
            assert response.status_code == 200
        assert [request.tenant for request in router.requests] == ["team", "bob"]


async def test_limits_are_told_and_kept() -> None:
    async with bridge(KeyRing([ALICE, BOB])) as (http, _):
        for left in (2, 1, 0):
            response = await http.post("/v1/chat/completions", json=CHAT, headers=bearer("bob-secret"))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "3"
            assert response.headers["x-ratelimit-remaining-requests"] == str(left)
        refused = await http.post("/v1/chat/completions", json=CHAT, headers=bearer("bob-secret"))
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        unlimited = await http.post("/v1/chat/completions", json=CHAT, headers=bearer("alice-secret"))
        assert unlimited.status_code == 200 and "x-ratelimit-limit-requests" not in unlimited.headers


async def test_tokens_of_prompt_and_answer_are_charged_when_the_answer_ends() -> None:
    key = ApiKey(name="carol", sha256=digest_of("carol-secret"), tokens_per_minute=10)
    async with bridge(KeyRing([key])) as (http, _):  # the scripted prompt has 7 tokens
        ask = lambda: http.post("/v1/chat/completions", json=CHAT, headers=bearer("carol-secret"))  # noqa: E731
        statuses = [(await ask()).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]


async def test_bridges_with_one_redis_share_the_limits(redis_url: str) -> None:
    async with bridge(KeyRing([BOB]), redis_url) as (one, _), bridge(KeyRing([BOB]), redis_url) as (two, _):
        clients = (one, two, one, two)
        statuses = [(await http.get("/version", headers=bearer("bob-secret"))).status_code for http in clients]
        assert statuses == [200, 200, 200, 429]


async def test_a_bucket_fills_evenly_and_without_redis_each_bridge_counts_alone() -> None:
    limiter = RateLimiter(f"redis://127.0.0.1:{free_port()}/0")  # nobody is there
    key = ApiKey(name="dave", sha256="0" * 64, requests_per_minute=60)
    for _ in range(60):  # all in less than a second, after which there would be room for one more
        await limiter.admit(key)
    with pytest.raises(Overloaded) as refused:
        await limiter.admit(key)
    assert 0 < refused.value.retry_after_s <= 1
    await asyncio.sleep(refused.value.retry_after_s + 0.01)
    await limiter.admit(key)
    await limiter.close()


async def test_a_bucket_outlives_a_clock_that_is_set_back(redis_url: str) -> None:
    limiter = RateLimiter(redis_url)
    key = ApiKey(name="faye", sha256="0" * 64, requests_per_minute=60)
    async with open_redis(redis_url) as redis:
        now, _ = await redis.time()
        for level, at in ((30, now + 3600), (0, now + 3600)):
            await redis.hset("pw:rate:faye:requests", mapping={"level": level, "at": at})
            if level:
                await limiter.admit(key)
        with pytest.raises(Overloaded) as refused:
            await limiter.admit(key)
    assert 0 < refused.value.retry_after_s <= 1
    await asyncio.sleep(refused.value.retry_after_s + 0.01)
    await limiter.admit(key)
    await limiter.close()


async def test_web_pages_of_other_origins_need_leave() -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with bridge(KeyRing([ALICE]), allowed_origins=("https://a.example",)) as (http, _):
        allowed = await http.options("/v1/chat/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = await http.options("/v1/chat/completions", headers={**preflight, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
    async with bridge(KeyRing()) as (http, _):
        response = await http.get("/version", headers=preflight)
        assert "access-control-allow-origin" not in response.headers


def test_a_made_key_opens_with_its_entry(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["key", "erin", "--tenant", "team", "--tokens-per-minute", "500", "--admin"])
    comment, *entry = capsys.readouterr().out.splitlines()
    secret = comment.rpartition(" ")[2]
    file = tmp_path / "keys.yaml"
    file.write_text("\n".join(entry))
    ring = load_keys("", str(file))
    found = ring.find(secret)
    assert found is not None and found.tenant_name == "team" and found.admin and found.tokens_per_minute == 500
    assert secret not in file.read_text() and ring.find(secret + "x") is None and ring.find("") is None


def test_a_key_that_is_only_named_has_a_tenant_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    main(["key", "erin"])
    main(["key", "root", "--admin"])
    shown = capsys.readouterr().out
    file.write_text(shown)
    ring = load_keys("", str(file))
    found = [ring.find(line.rpartition(" ")[2]) for line in shown.splitlines() if line.startswith("#")]
    assert [(key.tenant_name, key.admin) for key in found if key] == [("erin", False), ("root", True)]


@pytest.mark.parametrize("name", ["123", "true", "1e3", "no"])
def test_a_key_may_be_named_by_what_yaml_takes_for_something_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["key", name, "--tenant", name])
    shown = capsys.readouterr().out
    file = tmp_path / "keys.yaml"
    file.write_text(shown)
    found = load_keys("", str(file)).find(shown.splitlines()[0].rpartition(" ")[2])
    assert found is not None
    assert (found.name, found.tenant) == (name, name)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["a b"], 1),
        (["a", "--tenant", "x: y"], 1),
        (["a", "--tenant", ""], 1),
        (["a", "--requests-per-minute", "0"], 2),
    ],
)
def test_no_entry_is_made_that_a_bridge_would_refuse(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["key", *arguments])
    assert ended.value.code == code
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("alice: x", "must be a YAML list"),
        ("- name: a", "sha256"),
        ("- {name: a, sha256: short}", "sha256"),
        (f"- {{name: a, sha256: '{'0' * 64}', wat: 1}}", "wat"),
        (f"- {{name: a, sha256: '{'0' * 64}'}}\n- {{name: b, sha256: '{'0' * 64}'}}", "same sha256"),
    ],
)
def test_a_bad_keys_file_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    with pytest.raises(StartupError, match=words):
        load_keys("", str(file))


def test_keys_of_the_flag_have_a_tenant_each() -> None:
    ring = load_keys("one, two", None)
    tenants = {key.tenant_name for key in map(ring.find, ("one", "two")) if key}
    assert tenants == {"api-key-1", "api-key-2"} and not load_keys("", None)
    assert digest_of("one") == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize("secret", ["schlüssel", "a\udcff", "a\nb"])
def test_a_key_that_no_client_can_send_is_refused_at_the_start(secret: str) -> None:
    with pytest.raises(StartupError, match="ASCII") as refused:
        load_keys(f"one,{secret}", None)
    assert secret not in str(refused.value)


async def test_a_key_of_any_bytes_is_one_that_is_not_known() -> None:
    async with bridge(KeyRing([ALICE])) as (http, _):
        for sent in ("alice-secrét".encode(), "alice-secrét".encode("latin-1"), b"\xff\xfe"):
            for headers in ({b"authorization": b"Bearer " + sent}, {b"x-api-key": sent}):
                assert (await http.get("/v1/models", headers=headers)).status_code == 401
