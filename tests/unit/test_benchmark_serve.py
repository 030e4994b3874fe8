"""The load generator against a plain SSE server that is not pagewire."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from pagewire_bench import pace, report
from pagewire_bench.client import Outcome
from pagewire_bench.workload import Calibration, Lengths, Workload, lengths
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TEMPLATE_TOKENS, TOKENS_PER_WORD, TOKENS_PER_CHUNK, GAP_S = 5, 2, 2, 0.01


class PlainServer:
    """An OpenAI-compatible server that counts two tokens a word and sends two tokens a chunk."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = self.streams = 0
        self.fails_every = 0
        self.cut_short = False
        self.kv_bytes: int | None = None
        self.url = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/metrics", self._metrics),
            ]
        )

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"data": [{"id": "plain"}]})

    async def _metrics(self, _request: Request) -> Response:
        if self.kv_bytes is None:
            return Response(status_code=404)
        self.kv_bytes += 1000
        lines = [
            "# TYPE pagewire_kv_transfer_bytes_total counter",
            f'pagewire_kv_transfer_bytes_total{{direction="sent",lane="gloo",instance="p"}} {self.kv_bytes}',
            f'pagewire_kv_transfer_bytes_total{{direction="received",lane="gloo",instance="d"}} {self.kv_bytes}',
            "# TYPE pagewire_kv_transfer_seconds histogram",
            f'pagewire_kv_transfer_seconds_bucket{{le="+Inf"}} {self.kv_bytes / 1000}',
            f"pagewire_kv_transfer_seconds_sum {self.kv_bytes / 1e6}",
            f"pagewire_kv_transfer_seconds_count {self.kv_bytes / 1000}",
        ]
        return Response("\n".join(lines) + "\n")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        usage = {
            "prompt_tokens": TEMPLATE_TOKENS + TOKENS_PER_WORD * len(prompt.split()),
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 5},
        }
        if not body.get("stream"):
            return JSONResponse({"choices": [{}], "usage": usage})
        self.bodies.append(body)
        if self.fails_every and len(self.bodies) % self.fails_every == 0:
            return JSONResponse({"error": {"message": "full"}}, status_code=429)
        return StreamingResponse(self._stream(body, usage), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], usage: dict[str, Any]) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        is_chat = "messages" in body
        if is_chat:
            yield b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": null}\n\n'
        for _ in range(body["max_tokens"] // TOKENS_PER_CHUNK):
            choice: dict[str, Any] = {"delta": {"content": "a b"}} if is_chat else {"text": "a b"}
            await asyncio.sleep(GAP_S)
            yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
        self.in_flight -= 1
        if not self.cut_short:
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()


@pytest.fixture
def server() -> Iterator[PlainServer]:
    plain = PlainServer()
    uvicorn_server = uvicorn.Server(uvicorn.Config(plain.app(), port=0, log_level="error"))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    plain.url = f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    yield plain
    uvicorn_server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def load_generator() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "serve.py"
    spec = importlib.util.spec_from_file_location("benchmark_serve", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _measure(load_generator: ModuleType, server: PlainServer, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    load_generator.main(["--base-url", server.url, "--out", str(out), *arguments])
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_lengths_and_latencies_are_those_of_the_server(
    endpoint: str, load_generator: ModuleType, server: PlainServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = _measure(
        load_generator, server, tmp_path, "--endpoint", endpoint, "--num-requests=6", "--concurrency=3",
        "--prompt-len=65", "--output-len=8", "--warmup=1",
    )  # fmt: skip
    results = measured["results"]
    assert (results["completed"], results["errors"], results["transfer"]) == (6, {}, None)
    assert (results["prompt_tokens"], results["output_tokens"]) == (6 * 65, 6 * 8)
    assert results["cached_tokens_share"] == pytest.approx(5 / 65)
    assert len(server.bodies) == 7 and server.most_in_flight == 3
    assert all(body["ignore_eos"] and body["max_tokens"] == 8 for body in server.bodies)
    # Two tokens a chunk: a token takes half of the gap between chunks.
    assert GAP_S / 2 * 0.7 < results["itl_ms"]["p50"] / 1000 < GAP_S
    assert GAP_S <= results["ttft_ms"]["mean"] / 1000 < results["e2e_ms"]["mean"] / 1000
    assert measured["configuration"]["prompt_len"] == {"low": 65, "high": 65}
    assert measured["configuration"]["model"] == "plain" and measured["machine"]["cpus"]
    out = capsys.readouterr().out
    assert "TTFT (ms)" in out and "6 requests in" in out


def test_arrivals_do_not_wait_for_answers(load_generator: ModuleType, server: PlainServer, tmp_path: Path) -> None:
    measured = _measure(
        load_generator, server, tmp_path, "--request-rate=200", "--num-requests=10", "--output-len=40", "--warmup=0"
    )
    assert measured["results"]["completed"] == 10
    assert server.most_in_flight > 4


def test_a_duration_ends_the_sending(load_generator: ModuleType, server: PlainServer, tmp_path: Path) -> None:
    measured = _measure(load_generator, server, tmp_path, "--duration=0.3", "--output-len=2", "--concurrency=2")
    assert 2 <= measured["results"]["completed"] <= 60


def test_failures_are_counted_and_do_not_enter_the_latencies(
    load_generator: ModuleType, server: PlainServer, tmp_path: Path
) -> None:
    server.fails_every = 3
    measured = _measure(
        load_generator, server, tmp_path, "--num-requests=6", "--concurrency=1", "--warmup=0", "--output-len=4"
    )
    assert measured["results"]["completed"] == 4
    assert measured["results"]["errors"] == {"HTTP 429": 2}


def test_a_stream_that_is_cut_short_is_an_error(
    load_generator: ModuleType, server: PlainServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut_short = True
    with pytest.raises(SystemExit, match="no request completed"):
        load_generator.main(["--base-url", server.url, "--num-requests=2", "--output-len=4"])
    assert "2 x stream ended without [DONE]" in capsys.readouterr().out


def test_the_transfer_of_a_pagewire_server_is_the_difference_of_its_metrics(
    load_generator: ModuleType, server: PlainServer, tmp_path: Path
) -> None:
    server.kv_bytes = 5000
    measured = _measure(load_generator, server, tmp_path, "--num-requests=2", "--output-len=4")
    moved = measured["results"]["transfer"]
    assert (moved["transfers"], moved["bytes"]) == (1, 1000)
    assert moved["seconds"] == pytest.approx(0.001)
    assert moved["mb_per_s"] == pytest.approx(1.0)
    assert measured["server"]["is_pagewire"]


def test_a_server_that_is_down_is_one_sentence(load_generator: ModuleType) -> None:
    with pytest.raises(SystemExit, match="lists no models; is it up"):
        load_generator.main(["--base-url", "http://127.0.0.1:1"])


def test_the_same_seed_makes_the_same_prompts_with_the_same_shared_part() -> None:
    workload = Workload(Calibration(3, 1.5), Lengths(100, 200), Lengths(1, 9), 0.5, seed=7)
    first, again, other = workload.request(0), workload.request(0), workload.request(1)
    assert first == again and first.prompt != other.prompt
    shared = min(round(len(request.prompt.split()) * 0.5) for request in (first, other))
    assert first.prompt.split()[:shared] == other.prompt.split()[:shared]
    assert first.prompt.split()[-5:] != other.prompt.split()[-5:]


@pytest.mark.parametrize("text", ["0", "5:4", "-1", "a", ":3"])
def test_a_length_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        lengths(text)


def test_percentiles_are_those_of_the_definition() -> None:
    values = [float(value) for value in range(101)]
    random.Random(0).shuffle(values)
    assert report.distribution(values) == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert report.distribution([]) == {}


async def test_poisson_arrivals_have_the_asked_rate() -> None:
    sent: list[float] = []

    async def send(_index: int) -> Outcome:
        sent.append(time.perf_counter())
        return Outcome()

    await pace.arrive_at(1000.0, 0, pace.indices(300, None), send)
    assert 0.15 < sent[-1] - sent[0] < 0.9
