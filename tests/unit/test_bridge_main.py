"""The bridge as a process: start-up mistakes, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from scripted_router import HELLO, ScriptedRouter, accepted, delta, running_router


@contextlib.asynccontextmanager
async def bridge_process(*flags: str, files: int = 1024) -> AsyncIterator[asyncio.subprocess.Process]:
    """files: that the shell which starts it lets it have open, unless it asks for more."""
    shell = ("sh", "-c", f'ulimit -Sn {files} && exec "$@"', "sh")
    process = await asyncio.create_subprocess_exec(
        *shell, sys.executable, "-P", "-m", "pagewire_bridge.main", *flags, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ready_port(process: asyncio.subprocess.Process) -> int:
    assert process.stderr is not None
    line = json.loads(await process.stderr.readline())
    assert line["event"] == "bridge ready"
    return int(line["port"])


@pytest.mark.parametrize("flag", ["--port", "--ollama-port"])
async def test_a_port_in_use_is_one_sentence_and_exit_code_1(flag: str) -> None:
    """Of the two ports, the sentence names the flag of the one that is taken: where an Ollama runs, its."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with bridge_process("--router", "127.0.0.1:1", "--port=0", flag, str(port)) as process:
            _, stderr = await process.communicate()
    assert process.returncode == 1
    what = f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host or {flag}"
    assert stderr.decode() == f"pagewire-bridge: {what}\n"


async def test_more_clients_may_come_than_a_shell_allows_open_files() -> None:
    async with (
        bridge_process("--router=127.0.0.1:1", "--port=0", files=64) as process,
        contextlib.AsyncExitStack() as all,
    ):
        port = await ready_port(process)
        for _ in range(100):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            all.callback(writer.close)
            writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await reader.readline()


async def test_a_missing_router_is_one_sentence_and_exit_code_1() -> None:
    async with bridge_process() as process:
        _, stderr = await process.communicate()
    assert (process.returncode, stderr) == (1, b"pagewire-bridge: the bridge needs --router host:port\n")


async def is_refused(url: str) -> bool:
    async with httpx.AsyncClient() as http:
        try:
            await http.get(url)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:  # it was let in, and is sent away
            pass
    return False


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_a_running_stream_finish_and_ends_with_0(ended_by: signal.Signals) -> None:
    router, go_on = ScriptedRouter(), asyncio.Event()

    async def script(request: object) -> AsyncIterator[object]:
        yield accepted()
        yield delta("first")
        await go_on.wait()
        async for event in HELLO(request):  # type: ignore[arg-type]
            if event.WhichOneof("event") != "accepted":
                yield event

    router.script = script  # type: ignore[assignment]
    async with running_router(router) as (_server, address), bridge_process("--router", address) as process:
        url = f"http://127.0.0.1:{await ready_port(process)}"
        body = {"prompt": "x", "stream": True}
        async with httpx.AsyncClient() as http, http.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            assert "first" in await anext(lines)
            process.send_signal(ended_by)
            async with asyncio.timeout(20):
                while not await is_refused(f"{url}/version"):
                    await asyncio.sleep(0.01)
            go_on.set()
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert await asyncio.wait_for(process.wait(), 20) == 0


def test_a_signal_in_the_last_moment_of_the_start_ends_it() -> None:
    code = """
import os, signal, sys
from pagewire_bridge import main
main.freeze_heap = lambda: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["pagewire-bridge", "--router=127.0.0.1:1", "--port=0"]
main.main()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr


def test_the_bridge_never_imports_torch() -> None:
    code = "import sys, pagewire_bridge.main; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
