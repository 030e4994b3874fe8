"""The supervisor with small real processes in the services' places, and with the real Redis server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pagewire_cli import ports, readiness, redis_server, service, supervisor
from pagewire_cli.plan import Plan, ServiceSpec
from pagewire_cli.supervisor import Supervisor
from pagewire_core.errors import StartupError
from pagewire_core.redis_link import require_reachable

# Listens, writes its name down when it is told to stop, and ends (unless it is stubborn).
SERVER = """
import signal, socket, sys, time
port, name, diary, stubborn = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
def stop(*_):
    with open(diary, "a") as file: file.write(name + "\\n")
    if not stubborn: sys.exit(0)
signal.signal(signal.SIGTERM, stop)
server = socket.create_server(("127.0.0.1", port))
while True: time.sleep(0.01)
"""
FAILS = """
import sys
sys.exit("Traceback ...\\npagewire-worker: no config.json in /x; name another\\nterminate called")
"""


async def _listens(address: str) -> bool:
    host, port = address.split(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


def _spec(name: str, command: tuple[str, ...], port: int, is_ready: Callable[[str], Awaitable[bool]]) -> ServiceSpec:
    return ServiceSpec(name, name.partition("-")[0], f"127.0.0.1:{port}", command, dict(os.environ), is_ready)


def _make_plan(directory: Path, scripts: dict[str, str] | None = None, stubborn: str = "") -> Plan:
    """redis, prefill-0, decode-0, router and bridge, all of them SERVER unless `scripts` says otherwise."""
    names = ("redis", "prefill-0", "decode-0", "router", "bridge")
    specs = []
    for name, port in zip(names, ports.free_ports(len(names)), strict=True):
        script = (scripts or {}).get(name, SERVER)
        extra = ("stubborn",) if name == stubborn else ()
        command = (sys.executable, "-I", "-S", "-c", script, str(port), name, str(directory / "diary"), *extra)
        specs.append(_spec(name, command, port, _listens))
    base_url = f"http://{specs[-1].address}"
    return Plan(tuple(specs), base_url, "redis://h", "m", directory / "run", False, directory / "state.json")


async def _state(plan: Plan, unlike: object = None) -> dict[str, int]:
    """name -> pid, as soon as the state file says something other than `unlike`."""
    assert plan.state_file is not None
    async with asyncio.timeout(15):
        while True:
            if plan.state_file.exists():
                state = json.loads(plan.state_file.read_text())
                pids = {service["name"]: service["pid"] for service in state["services"]}
                if pids != unlike:
                    return pids
            await asyncio.sleep(0.02)


@asynccontextmanager
async def _running(plan: Plan) -> AsyncIterator[asyncio.Task[None]]:
    """A supervisor at work; stops it as Ctrl-C does unless the test has, and sees that nothing is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    task = asyncio.create_task(Supervisor(plan, time.monotonic()).run())
    try:
        yield task
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.wait_for(task, 15)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.fixture(autouse=True)
def _nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins speak no gRPC, for whose answer the supervisor would wait two seconds each time."""

    async def has_chat_template(_self: Supervisor) -> bool:
        return True

    async def startup_phases(*_: object) -> dict[str, float]:
        return {}

    monkeypatch.setattr(Supervisor, "_has_chat_template", has_chat_template)
    monkeypatch.setattr(readiness, "startup_phases", startup_phases)


async def test_every_service_is_announced_and_all_are_stopped_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _make_plan(tmp_path)
    async with _running(plan):
        pids = await _state(plan)
        assert all(psutil.pid_exists(pid) for pid in pids.values())
        assert {path.stat().st_mode & 0o777 for path in plan.directory.glob("*.log")} == {0o600}
    lines = capsys.readouterr().out.splitlines()
    for spec in plan.services:
        pattern = rf"{spec.name} +ready +pid {pids[spec.name]} +{spec.address} +\d+\.\d s"
        assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == 1
    assert lines[0].startswith("redis")
    assert any(line.startswith("curl ") for line in lines)
    diary = (tmp_path / "diary").read_text().split()
    assert diary[:2] == ["bridge", "router"]
    assert set(diary[2:4]) == {"prefill-0", "decode-0"}
    assert diary[4:] == ["redis"]
    assert not (tmp_path / "state.json").exists()


async def test_a_service_that_dies_at_start_is_quoted_and_the_others_are_stopped(tmp_path: Path) -> None:
    plan = _make_plan(tmp_path, {"decode-0": FAILS})
    async with _running(plan) as task:
        with pytest.raises(StartupError, match=r"^decode-0 did not start: no config.json in /x; name another \(log: "):
            await asyncio.wait_for(task, 15)


async def test_a_service_killed_before_it_is_ready_says_so(tmp_path: Path) -> None:
    suicide = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    async with _running(_make_plan(tmp_path, {"router": suicide})) as task:
        with pytest.raises(StartupError, match="router did not start: killed by SIGSEGV"):
            await asyncio.wait_for(task, 15)


async def test_a_service_killed_while_memory_runs_out_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suicide = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(service, "oom_kills", itertools.count().__next__)
    async with _running(_make_plan(tmp_path, {"decode-0": suicide})) as task:
        with pytest.raises(
            StartupError, match="decode-0 did not start: killed by SIGKILL, it seems for want of memory"
        ):
            await asyncio.wait_for(task, 15)


async def test_a_service_that_dies_later_comes_back_on_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.1)
    plan = _make_plan(tmp_path)
    async with _running(plan):
        before = await _state(plan)
        os.kill(before["decode-0"], signal.SIGKILL)
        after = await _state(plan, unlike=before)
        assert {name for name in before if before[name] != after[name]} == {"decode-0"}
        assert await _listens(plan.address_of("decode"))
    out = capsys.readouterr().out
    assert re.search(rf"decode-0 +ended +pid {before['decode-0']} +killed by SIGKILL; restarts in 0.1 s", out)
    assert len(re.findall(r"^decode-0 +ready", out, re.MULTILINE)) == 2


async def test_a_death_is_noticed_where_a_sandbox_forbids_pidfds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", forbidden, raising=False)
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.1)
    plan = _make_plan(tmp_path)
    async with _running(plan):
        before = await _state(plan)
        os.kill(before["decode-0"], signal.SIGKILL)
        assert (await _state(plan, unlike=before))["decode-0"] != before["decode-0"]


async def test_waits_between_restarts_double_while_a_service_keeps_dying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.02)
    once = f"import os, sys\nif os.path.exists('{tmp_path}/lived'): sys.exit(3)\nopen('{tmp_path}/lived', 'w')\n"
    plan = _make_plan(tmp_path, {"prefill-0": once + SERVER})
    async with _running(plan):
        os.kill((await _state(plan))["prefill-0"], signal.SIGKILL)
        async with asyncio.timeout(15):
            out = ""
            while "restarts in 0.08 s" not in out:
                out += capsys.readouterr().out
                await asyncio.sleep(0.02)
    assert "exited with code 3; restarts in 0.04 s" in out


async def test_a_service_deaf_to_sigterm_is_killed_after_the_grace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = replace(_make_plan(tmp_path, stubborn="decode-0"), grace_s=0.3)
    async with _running(plan):
        await _state(plan)
    assert re.search(r"decode-0 +was killed: it had not stopped after 0.3 s", capsys.readouterr().out)


async def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    plan = _make_plan(tmp_path, stubborn="bridge")
    async with _running(plan) as task:
        await _state(plan)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.2)
        started = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(task, 15)
    assert time.monotonic() - started < plan.grace_s


async def test_ctrl_c_while_services_load_stops_them(tmp_path: Path) -> None:
    plan = _make_plan(tmp_path, {"decode-0": "import time; time.sleep(600)"})
    async with _running(plan):
        await asyncio.sleep(0.3)
    assert not (tmp_path / "state.json").exists()


async def test_ctrl_c_while_a_failed_start_is_stopped_kills_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _make_plan(tmp_path, {"bridge": FAILS}, stubborn="decode-0")
    async with _running(plan) as task:
        async with asyncio.timeout(15):
            out = ""
            while "Stopping; Ctrl-C again kills." not in out:
                out += capsys.readouterr().out
                await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StartupError, match="bridge did not start"):
            await asyncio.wait_for(task, plan.grace_s / 2)


async def test_a_hangup_ends_nothing_under_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        plan = _make_plan(tmp_path)
        async with _running(plan) as task:
            await _state(plan)
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.1)
            assert not task.done()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "kill, said",
    [(signal.SIGTERM, "exited with code 0"), (signal.SIGRTMIN + 1, f"killed by signal {signal.SIGRTMIN + 1}")],
    ids=["it ends by itself", "a signal without a name"],
)
async def test_a_service_whose_logs_were_removed_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kill: int, said: str
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.1)
    plan = _make_plan(tmp_path)
    async with _running(plan):
        before = await _state(plan)
        shutil.rmtree(plan.directory)
        os.kill(before["decode-0"], kill)
        await _state(plan, unlike=before)
        assert (plan.directory / "decode-0.log").stat().st_mode & 0o777 == 0o600
    assert f"{said}; restarts in 0.1 s" in capsys.readouterr().out


async def test_a_service_that_the_system_does_not_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As while processes or memory are used up."""
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.05)
    plan = _make_plan(tmp_path)
    async with _running(plan):
        before = await _state(plan)
        popen, refusals = subprocess.Popen, [OSError(11, "Resource temporarily unavailable")]

        def start(*arguments: object, **options: object) -> object:
            if refusals:
                raise refusals.pop()
            return popen(*arguments, **options)  # type: ignore[call-overload]

        monkeypatch.setattr(service.subprocess, "Popen", start)
        os.kill(before["decode-0"], signal.SIGKILL)
        await _state(plan, unlike=before)
    assert re.search(r"decode-0 .* does not start it: .*temporarily unavailable; restarts in 0.1 s",
                     capsys.readouterr().out)  # fmt: skip


async def test_a_state_file_that_cannot_be_written_is_told_before_anything_starts(tmp_path: Path) -> None:
    plan = replace(_make_plan(tmp_path), state_file=tmp_path / "none" / "state.json")
    with pytest.raises(StartupError, match=r"cannot write --state-file: .*none"):
        await Supervisor(plan, time.monotonic()).run()


async def test_a_state_file_that_cannot_be_written_any_more_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.1)
    plan = _make_plan(tmp_path)
    async with _running(plan) as task:
        pids = await _state(plan)
        (tmp_path / "state.json").unlink()
        (tmp_path / "state.json").mkdir()
        os.kill(pids["decode-0"], signal.SIGKILL)
        async with asyncio.timeout(15):
            out = ""
            while "cannot write --state-file" not in out:
                out += capsys.readouterr().out
                await asyncio.sleep(0.02)
        assert not task.done()


async def test_a_full_disk_under_what_serve_prints_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.1)
    plan = replace(_make_plan(tmp_path), verbose=True)
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        async with _running(plan):
            before = await _state(plan)
            with (plan.directory / "decode-0.log").open("a") as log:
                log.write("a line\n")
            await asyncio.sleep(0.5)  # until it has been followed
            os.kill(before["decode-0"], signal.SIGKILL)
            await _state(plan, unlike=before)
        monkeypatch.undo()
        for file in (out, err):
            with contextlib.suppress(OSError):
                file.close()


async def test_two_deployments_do_not_share_a_directory(tmp_path: Path) -> None:
    plan = _make_plan(tmp_path)
    async with _running(plan):
        await _state(plan)
        other = replace(_make_plan(tmp_path), state_file=None)
        with pytest.raises(StartupError, match=r"another pagewire serve uses .*/run; choose another --port"):
            await Supervisor(other, time.monotonic()).run()


async def test_redis_that_is_killed_comes_back_on_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_RESTART_S", 0.1)
    plan = _make_plan(tmp_path)
    (port,) = ports.free_ports(1)
    command = redis_server.command(f"127.0.0.1:{port}", tmp_path)
    redis = _spec("redis", command, port, readiness.redis_answers)
    plan = Plan((redis, *plan.services[1:]), plan.base_url, "", "m", tmp_path / "run", False, plan.state_file)
    async with _running(plan):
        before = await _state(plan)
        os.kill(before["redis"], signal.SIGKILL)
        await _state(plan, unlike=before)
        await require_reachable(f"redis://127.0.0.1:{port}/0")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_no_service_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    port = ports.free_ports(1)[0]
    script = f"""
import asyncio, os, sys, time
from pathlib import Path
from pagewire_cli.plan import Plan, ServiceSpec
from pagewire_cli.supervisor import Supervisor
async def ready(_address): return True
command = (sys.executable, "-c", "import time; time.sleep(600)")
spec = ServiceSpec("router", "router", "127.0.0.1:{port}", command, dict(os.environ), ready)
plan = Plan((spec,), "", "", "m", Path({str(tmp_path)!r}), False, None)
asyncio.run(Supervisor(plan, time.monotonic()).run())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        match = re.search(r"pid (\d+)", parent.stdout.readline())
        assert match is not None
        child = psutil.Process(int(match[1]))
        parent.kill()
        child.wait(30)


@contextmanager
def _listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _pagewire(*arguments: str, state_home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_STATE_HOME": str(state_home)}
    command = [sys.executable, "-m", "pagewire_cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_a_port_in_use_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    with _listener() as port:
        done = _pagewire("serve", f"--port={port}", state_home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"pagewire: port {port} on 127.0.0.1 is in use") and done.stderr.count("\n") == 1


def test_an_unreachable_redis_is_one_sentence_that_keeps_the_password(tmp_path: Path) -> None:
    (port,) = ports.free_ports(1)
    done = _pagewire("serve", "--port=0", f"--redis-url=redis://:secret@127.0.0.1:{port}/0", state_home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot reach Redis at 127.0.0.1:{port}" in done.stderr and done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_ctrl_c_ends_a_download(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:
        command = [sys.executable, "-m", "pagewire_cli.main", "serve", "org/model", "--port=0"]
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path),
            "XDG_STATE_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "60", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as serving:
            hub.settimeout(60)
            connection, _ = hub.accept()  # and no answer
            with connection:
                serving.send_signal(signal.SIGINT)
                try:
                    _, said = serving.communicate(timeout=10)
                finally:
                    serving.kill()
        assert (serving.returncode, said) == (130, "")


def test_the_cli_never_imports_torch() -> None:
    code = "import pagewire_cli.main, pagewire_cli.supervisor, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
