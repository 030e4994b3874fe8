"""`pagewire serve --api-server-count 2`: two HTTP servers on one port, each with a router of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pagewire_cli.readiness import http_healthy
from processes import free_port, lives, script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over a shared port")
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}
STORY = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0}
NAMES = {"bridge-0", "bridge-1"}


@contextlib.asynccontextmanager
async def serving(directory: Path, *flags: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process and its state file, once everything is ready."""
    state = directory / "state.json"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PAGEWIRE_")} | {"XDG_STATE_HOME": str(directory)}
    command = [*script("pagewire"), "serve", f"--state-file={state}", f"--port={free_port()}", *flags]
    with (directory / "output").open("wb") as output:
        popen = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    try:
        async with asyncio.timeout(120):
            while not state.exists():
                assert popen.poll() is None, (directory / "output").read_text()
                await asyncio.sleep(0.1)
        yield popen, state
    finally:
        popen.kill()
        popen.wait()


def pids(state: Path) -> dict[str, int]:
    return {service["name"]: service["pid"] for service in json.loads(state.read_text())["services"]}


async def reached(http: httpx.AsyncClient) -> str:
    """Which bridge answers on the client's only connection."""
    metrics = (await http.get("/metrics")).text
    (bridge,) = set(re.findall(r'pagewire_bridge_requests_in_flight{instance="(.*?)"}', metrics))
    (router,) = set(re.findall(r'pagewire_running_requests{instance="(.*?)"}', metrics))
    assert router[-1] == bridge[-1], "each has a router of its own"
    assert 'pagewire_engine_total_blocks{instance="both-' in metrics, "whoever is asked, workers are the same"
    return bridge


async def one_connection_to_each(url: str, stack: contextlib.AsyncExitStack) -> dict[str, httpx.AsyncClient]:
    """The kernel chooses by the client's port: in 100 connections both are met, but for one time in 2^99."""
    found: dict[str, httpx.AsyncClient] = {}
    for _ in range(100):
        limits = httpx.Limits(max_connections=1)
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, limits=limits, trust_env=False, timeout=60)
        )
        found.setdefault(await reached(http), http)
        if found.keys() == NAMES:
            return found
    raise AssertionError(f"connections reach {found.keys()} alone")


async def answers(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json=QUESTION)
    assert response.json()["choices"][0]["message"]["content"] == "The capital of Japan is Tokyo."


async def test_both_answer_one_dies_and_comes_back_and_the_other_does_not_notice(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, "--both=1", "--api-server-count=2") as (popen, state),
        contextlib.AsyncExitStack() as s,
    ):
        before, facts = pids(state), json.loads(state.read_text())
        children = psutil.Process(popen.pid).children(recursive=True)
        assert before.keys() == {"redis", "both-0", "router-0", "router-1", *NAMES}
        clients = await one_connection_to_each(facts["base_url"], s)
        for http in clients.values():
            await answers(http)
        stored = (await clients["bridge-0"].post("/v1/responses", json={"input": "Hi", "max_output_tokens": 4})).json()
        assert (await clients["bridge-1"].get(f"/v1/responses/{stored['id']}")).json()["output"] == stored["output"]
        for service in facts["services"]:  # at a port of its own each answers for itself alone
            if service["role"] == "bridge":
                text = (await clients["bridge-0"].get(f"http://{service['address']}/metrics")).text
                count = r'pagewire_bridge_requests_total{instance="(.*)",route="/v1/chat/completions",status="200"} 1.0'
                assert re.findall(count, text) == [service["name"]]

        whole = await clients["bridge-1"].post("/v1/completions", json=STORY | {"stream": False})
        async with clients["bridge-1"].stream("POST", "/v1/completions", json=STORY) as response:
            lines = response.aiter_lines()
            pieces = [json.loads((await anext(lines))[6:])]
            for name in ("bridge-0", "router-0"):
                os.kill(before[name], signal.SIGKILL)
            pieces += [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
        assert "".join(p["choices"][0]["text"] for p in pieces) == whole.json()["choices"][0]["text"]
        await answers(clients["bridge-1"])
        async with asyncio.timeout(60):
            while {name for name, pid in pids(state).items() if before[name] != pid} != {"bridge-0", "router-0"}:
                await asyncio.sleep(0.05)
            [own] = [service["address"] for service in facts["services"] if service["name"] == "bridge-0"]
            while not await http_healthy(own):  # the file may tell of it before it listens
                await asyncio.sleep(0.05)
        await answers((await one_connection_to_each(facts["base_url"], s))["bridge-0"])

        children += psutil.Process(popen.pid).children(recursive=True)
        popen.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(popen.wait, 60) == 0
        assert not [child for child in children if lives(child)]
        assert not state.exists()


async def test_a_port_that_servers_share_is_taken_for_everybody_else(tmp_path: Path) -> None:
    """SO_REUSEPORT lets any process of the same user in that asks for it; a second `serve` must not."""
    from pagewire_bridge.main import listen
    from pagewire_cli import ports
    from pagewire_core.errors import StartupError

    first = listen("127.0.0.1", 0, shared=True)
    port: Any = first.getsockname()[1]
    with first, listen("127.0.0.1", port, shared=True):
        assert not ports.is_free("127.0.0.1", port)
        with pytest.raises(StartupError, match="Address already in use"):
            listen("127.0.0.1", port)
