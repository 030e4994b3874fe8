"""The comparison of servers: its loads, its statistics, the processes it starts and halts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import runpy
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from pagewire_bench import contestants, ratios
from pagewire_bench.contestants import Contestant, Setting
from pagewire_bench.loads import LOADS, Load, apply
from pagewire_bench.server_process import ServerProcess
from pagewire_bench.token_workload import TokenWorkload
from pagewire_cli.load.client import ServerUnfit, Target
from pagewire_cli.load.http import Server
from pagewire_core.machine import available_cpus
from rich.console import Console

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Answers every POST; has a child process, as most servers do.
SERVER = """
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@asynccontextmanager
async def serving(pieces: list[bytes], gap_s: float = 0.0) -> AsyncIterator[str]:
    """A server that answers with these bytes, written one after the other, and then closes."""

    tasks: list[asyncio.Task[None] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.partition(b":")[2]))
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(gap_s)
        writer.close()
        with contextlib.suppress(ConnectionError):  # the client may have closed first
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await asyncio.gather(*(task for task in tasks if task))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(**content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Of a model that every server can read, in bf16."""
    (tmp_path / "model-BF16.gguf").touch()
    return Setting(tmp_path, "bf16", threads=2, slots=32, max_len=1000, total_tokens=8000)


OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = event(choices=[{"text": "a"}])
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def test_a_body_is_whole_however_it_is_cut_and_has_the_time_of_each_piece() -> None:
    body = chunk(TOKEN) + chunk(TOKEN)
    cut = len(chunk(TOKEN)) - 7  # within the first event
    async with serving([OK + body[:cut], body[cut:], END], gap_s=0.1) as url:
        server = Server(url)
        response = await server.send(server.request("POST", "/v1/completions", {}), 5.0)
    assert (response.status, response.complete) == (200, True)
    assert b"".join(piece.body for piece in response.pieces) == TOKEN + TOKEN + b"data: [DONE]\n\n"
    assert response.pieces[-1].at - response.pieces[0].at > 0.1


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([], "no response"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Enc"], "no response"),
        ([OK + chunk(TOKEN)], "stream ended without [DONE]"),
        ([OK + chunk(TOKEN) + b"not a length\r\n"], "stream ended without [DONE]"),
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"], "HTTP 503"),
        ([OK + chunk(TOKEN) + chunk(event(choices=[], usage={"completion_tokens": 3})) + END], "3 of 4 tokens"),
    ],
)
async def test_an_answer_that_is_broken_or_short_is_an_error(pieces: list[bytes], error: str) -> None:
    """A server that ends early would look fast."""
    async with serving(pieces) as url:
        result = await apply(Load(1, 1, 8, 4), Target(Server(url), "m"), 100, "seed")
    assert result["errors"] == {error: 1} and not result["completed"]


async def test_a_server_that_is_gone_is_an_error() -> None:
    result = await apply(Load(1, 1, 8, 4), Target(Server("http://127.0.0.1:1"), "m"), 100, "seed")
    assert result["errors"] == {"ConnectionRefusedError": 1}


def test_token_prompts_are_exact_and_share_what_they_should() -> None:
    workload = TokenWorkload(500, 40, 8, 0.75, "seed")
    first, second = workload.request(0).prompt, workload.request(1).prompt
    assert workload.request(0).prompt == first and len(first) == len(second) == 40
    assert first[:30] == second[:30] and first[30:] != second[30:]
    assert all(isinstance(token, int) and 64 <= token < 500 for token in (*first, *second))
    other_round = TokenWorkload(500, 40, 8, 0.75, "another").request(0).prompt
    assert other_round[:30] != first[:30], "a prefix cache would have it from the round before"


def test_a_gain_above_one_is_better_for_rates_and_for_times() -> None:
    assert ratios.gains([20.0, 30.0], [10.0, 10.0], higher_is_better=True) == [2.0, 3.0]
    assert ratios.gains([20.0, 30.0], [10.0, 60.0], higher_is_better=False) == [0.5, 2.0]
    assert ratios.gains([0.0], [10.0], higher_is_better=False) == [math.inf], "tokens that came together are 0 ms apart"


def test_the_best_peer_has_the_best_median_and_no_failed_load() -> None:
    values: dict[str, list[float]] = {"a": [1.0, 5.0, 6.0], "b": [4.0, 4.0, 9.0], "failed": []}
    assert ratios.best(values, higher_is_better=True) == "a"
    assert ratios.best(values, higher_is_better=False) == "b"
    assert ratios.best({"failed": []}, higher_is_better=True) is None


def _rounds(*rates: float, errors: int = 0) -> list[dict[str, Any]]:
    return [{"output_tokens_per_s": rate, "errors": {"x": errors} if errors else {}} for rate in rates]


def test_the_table_sets_ours_against_the_best_of_the_others_and_names_it() -> None:
    results = {
        "pagewire both": {"1 stream": _rounds(100, 110), "8 streams": _rounds(100, 100)},
        "slow": {"1 stream": _rounds(10, 10), "8 streams": _rounds(25, 20)},
        "fast": {"1 stream": _rounds(50, 50), "8 streams": _rounds(90, 90, errors=1)},
    }
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(ratios.table("m", ratios.FIGURES[0], results, ["1 stream", "8 streams"], ["pagewire both"]))
    first, second = (line for line in console.export_text().splitlines() if "stream" in line)
    assert "105.0 (100.0-110.0)" in first and "2.10 (2.00-2.20) fast" in first
    assert "failed" in second and "4.50 (4.00-5.00) slow" in second


def test_every_server_gets_the_same_threads_sequences_and_length(setting: Setting) -> None:
    both, split = (contestants.pagewire(setting, name) for name in contestants.OURS)
    cpus = f"--cpus={','.join(map(str, available_cpus()[:2]))}"
    assert cpus in both.command and cpus in split.command and "--max-num-seqs=32" in both.command
    llama, vllm = contestants.llama_cpp(setting, "llama-server"), contestants.vllm(setting, sys.executable)
    assert llama is not None and vllm is not None
    assert llama.command[llama.command.index("--ctx-size") + 1] == "32000"
    assert llama.command[llama.command.index("--parallel") + 1] == "32"
    assert vllm.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert all(contestant.command[-1] == "--port" for contestant in (both, split, llama, vllm))


def test_results_do_not_tell_where_things_lie_on_this_machine(setting: Setting) -> None:
    llama = contestants.llama_cpp(setting, "/home/somebody/llama-server")
    assert llama is not None
    assert llama.shown.startswith("llama-server --model model-BF16.gguf ") and "--parallel 32" in llama.shown
    assert "/" not in llama.shown


def test_quantized_weights_are_compared_where_they_exist(setting: Setting) -> None:
    quantized = dataclasses.replace(setting, precision="int4")
    assert contestants.vllm(quantized, sys.executable) is None and contestants.llama_cpp(quantized, "binary") is None
    assert contestants.transformers(quantized, sys.executable) is None
    assert "--quantization=int4" in contestants.pagewire(quantized, "pagewire both").command
    (setting.model / "model-Q4_0.gguf").touch()
    (setting.model / "compressed-int4").mkdir()
    llama, vllm = contestants.llama_cpp(quantized, "binary"), contestants.vllm(quantized, sys.executable)
    assert llama is not None and str(setting.model / "model-Q4_0.gguf") in llama.command
    assert vllm is not None and str(setting.model / "compressed-int4") in vllm.command


@pytest.fixture
def start(tmp_path: Path) -> Any:
    servers: list[ServerProcess] = []

    def _start(code: str, starts_slowly: bool) -> ServerProcess:
        command = (sys.executable, "-c", code)
        servers.append(ServerProcess(Contestant("test server", command, starts_slowly=starts_slowly), tmp_path))
        return servers[-1]

    yield _start
    for server in servers:
        server.stop()


def _ended(processes: list[psutil.Process]) -> bool:
    """Soon: a killed process takes a moment, and one without a parent may stay a zombie."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def _processes(server: ServerProcess) -> list[psutil.Process]:
    assert server._popen is not None
    parent = psutil.Process(server._popen.pid)
    return [parent, *parent.children(recursive=True)]


def test_a_slow_starter_is_halted_with_its_children_and_goes_on(start: Callable[..., ServerProcess]) -> None:
    """Two servers awake at once would each be measured on half a machine."""
    server = start(SERVER, True)
    server.wake()
    processes = _processes(server)
    assert len(processes) == 2
    server.rest()
    assert [process.status() for process in processes] == [psutil.STATUS_STOPPED] * 2
    server.wake()
    assert _processes(server) == processes
    server.stop()
    assert _ended(processes)


def test_a_quick_starter_ends_after_its_turn_and_can_start_again(start: Callable[..., ServerProcess]) -> None:
    server = start(SERVER, False)
    server.wake()
    before = _processes(server)
    server.rest()
    assert _ended(before)
    server.wake()
    assert _processes(server)[0] != before[0]


def test_a_server_that_does_not_start_is_told_with_its_last_words(start: Callable[..., ServerProcess]) -> None:
    with pytest.raises(ServerUnfit, match=r"test server ended with 3: out of tea"):
        start("import sys; print('out of tea'); sys.exit(3)", False).wake()


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    path = BENCHMARKS / "compare.py"
    spec = importlib.util.spec_from_file_location("benchmark_compare", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_quick_comparison_has_a_few_short_loads(compare: ModuleType) -> None:
    def loads(*arguments: str) -> dict[str, Load]:
        parsed: argparse.Namespace = compare._parser().parse_args(["model", *arguments])
        return dict(compare._loads(parsed))

    assert loads() == LOADS
    quick = loads("--quick")
    assert set(quick) < set(LOADS) and all(load.output_len <= 64 for load in quick.values())
    assert loads("--loads", "8 streams") == {"8 streams": LOADS["8 streams"]}
    with pytest.raises(SystemExit):
        loads("--loads", "9 streams")


@pytest.mark.parametrize("script", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_explains_itself(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A % in a help text once was a format."""
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
