"""`pagewire bench` against a plain SSE server that is not pagewire."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pagewire_cli.load import pace, report
from pagewire_cli.load.client import Outcome
from pagewire_cli.load.run import _target
from pagewire_cli.load.workload import Calibration, Lengths, RandomWorkload
from pagewire_cli.main import main
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
        self.wants_key = False

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/metrics", self._metrics),
                Route("/tokenize", self._tokenize, methods=["POST"]),
            ]
        )

    async def _models(self, _request: Request) -> Response:
        if self.wants_key:
            return JSONResponse({"error": {"message": "The API key is missing."}}, status_code=401)
        return JSONResponse({"data": [{"id": "plain"}]})

    async def _tokenize(self, request: Request) -> Response:
        return JSONResponse({"count": TOKENS_PER_WORD * len((await request.json())["prompt"].split())})

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


@pytest.fixture(scope="module")
def running() -> Iterator[PlainServer]:
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


@pytest.fixture
def server(running: PlainServer) -> PlainServer:
    """As if it were new."""
    vars(running).update({**vars(PlainServer()), "url": running.url})
    return running


def _measure(server: PlainServer, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    main(["bench", "--base-url", server.url, "--save-result", f"--result-dir={tmp_path / 'out'}",
          "--result-filename=out.json", *arguments])  # fmt: skip
    return dict(json.loads((tmp_path / "out" / "out.json").read_text()))


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_lengths_and_latencies_are_those_of_the_server(
    backend: str, server: PlainServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _measure(
        server, tmp_path, f"--backend={backend}", "--num-prompts=6", "--max-concurrency=3", "--random-input-len=65",
        "--random-output-len=8", "--num-warmups=1", "--goodput", "ttft:60000", "tpot:1",
    )  # fmt: skip
    assert (result["completed"], result["failed"], result["error_counts"], result["kv_transfer"]) == (6, 0, {}, None)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (6 * 65, 6 * 8)
    assert result["cached_tokens_share"] == pytest.approx(5 / 65)
    assert len(server.bodies) == 7 and server.most_in_flight == 3
    assert all(body["ignore_eos"] and body["max_tokens"] == 8 for body in server.bodies)
    # Two tokens a chunk: a token takes half of the gap between chunks, and all after the first three gaps.
    assert result["median_itl_ms"] / 1000 > GAP_S / 2 * 0.7 and result["mean_tpot_ms"] / 1000 > GAP_S * 3 / 7 * 0.7
    assert result["mean_itl_ms"] == pytest.approx(result["mean_tpot_ms"])
    assert 7 * result["mean_tpot_ms"] < result["mean_e2el_ms"] - result["mean_ttft_ms"] + 1
    assert GAP_S <= result["mean_ttft_ms"] / 1000 < result["mean_e2el_ms"] / 1000
    assert result["request_goodput"] == 0, "no token came within a millisecond"
    assert result["model_id"] == "plain" and result["machine"]["cpus"]
    assert result["request_throughput"] == pytest.approx(6 / result["duration"])


def test_the_table_is_that_of_vllm(server: PlainServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts that read it go on working: these are its labels, in its order and its columns."""
    server.kv_bytes = 0
    main(["bench", "serve", "--base-url", server.url + "/v1", "--num-prompts=2", "--random-output-len=4",
          "--metric-percentiles=50,99.9", "--percentile-metrics=ttft,e2el", "--request-rate=1000"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "============ Serving Benchmark Result ============",
        "Successful requests", "Failed requests", "Request rate configured (RPS)", "Benchmark duration (s)",
        "Total input tokens", "Total generated tokens", "Request throughput (req/s)",
        "Output token throughput (tok/s)", "Total Token throughput (tok/s)", "Input tokens from a cache (%)",
        "KV moved between workers (MB)", "KV transfer rate (MB/s)",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms)", "Median TTFT (ms)", "P50 TTFT (ms)", "P99.9 TTFT (ms)",
        "----------------End-to-end Latency----------------",
        "Mean E2EL (ms)", "Median E2EL (ms)", "P50 E2EL (ms)", "P99.9 E2EL (ms)",
        "==================================================",
    ]  # fmt: skip
    assert lines[1] == "Successful requests:                     2         "


def test_arrivals_do_not_wait_for_answers(server: PlainServer, tmp_path: Path) -> None:
    result = _measure(server, tmp_path, "--request-rate=200", "--num-prompts=10", "--random-output-len=40")
    assert result["completed"] == 10
    assert server.most_in_flight > 4
    server.most_in_flight = 0
    _measure(server, tmp_path, "--request-rate=200", "--num-prompts=10", "--random-output-len=8", "--max-concurrency=2")
    assert server.most_in_flight == 2


def test_a_duration_ends_the_sending(server: PlainServer, tmp_path: Path) -> None:
    result = _measure(server, tmp_path, "--duration=0.3", "--random-output-len=2", "--max-concurrency=2")
    assert 2 <= result["completed"] <= 60


def test_failures_are_counted_and_do_not_enter_the_latencies(
    server: PlainServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fails_every = 3
    result = _measure(server, tmp_path, "--num-prompts=6", "--max-concurrency=1", "--random-output-len=4")
    assert (result["completed"], result["failed"], result["error_counts"]) == (4, 2, {"HTTP 429": 2})
    assert "2 x HTTP 429" in capsys.readouterr().out


def test_a_stream_that_is_cut_short_is_an_error(server: PlainServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.cut_short = True
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--base-url", server.url, "--num-prompts=2", "--random-output-len=4"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.err == "pagewire: no request completed\n"
    assert "2 x stream ended without [DONE]" in said.out


def test_the_transfer_of_a_pagewire_server_is_the_difference_of_its_metrics(
    server: PlainServer, tmp_path: Path
) -> None:
    server.kv_bytes = 5000
    moved = _measure(server, tmp_path, "--num-prompts=2", "--random-output-len=4")["kv_transfer"]
    assert (moved["transfers"], moved["bytes"]) == (1, 1000)
    assert moved["seconds"] == pytest.approx(0.001)
    assert moved["mb_per_s"] == pytest.approx(1.0)


def test_a_server_that_wants_a_key_is_quoted(server: PlainServer, capsys: pytest.CaptureFixture[str]) -> None:
    """It is up, and has models."""
    server.wants_key = True
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--base-url", server.url, "--num-prompts=1"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        'pagewire: the server answers 401: {"error":{"message":"The API key is missing."}}\n'
    )


def test_a_result_that_cannot_be_saved_is_shown_and_told(
    server: PlainServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").touch()  # no folder
    with pytest.raises(SystemExit) as ended:
        _measure(server, tmp_path, "--num-prompts=1", "--random-output-len=4")
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "Successful requests" in shown.out
    assert shown.err.startswith("pagewire: cannot save the result: ") and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--base-url=http://127.0.0.1:1"], 1, "http://127.0.0.1:1 lists no models; is it up? Else name one"),
        (["--dataset-name=sharegpt"], 2, "--dataset-name sharegpt needs --dataset-path"),
        (["--dataset-name=custom", "--dataset-path=/nowhere"], 1, "[Errno 2] No such file or directory"),
        (["--goodput", "itl:5"], 2, "argument --goodput: write NAME:MILLISECONDS, with one of ttft, tpot, e2el"),
        (["--goodput", "ttft"], 2, "argument --goodput: write NAME:MILLISECONDS, with one of ttft, tpot, e2el"),
        (["--metric-percentiles", "p99"], 2, "argument --metric-percentiles: must be numbers between 0 and 100"),
        (["--random-range-ratio=1"], 2, "argument --random-range-ratio: must be in [0, 1)"),
        (["--concurrency=3"], 2, "unknown flag --concurrency; did you mean --max-concurrency?"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str], code: int, message: str, server: PlainServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", f"--base-url={server.url}", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == code and error.count("\n") == 1 and message in error


def test_prompts_may_come_from_lines_of_json(server: PlainServer, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one two"}\n\n{"prompt": "three"}\n')
    flags = ["--dataset-name=custom", f"--dataset-path={path}", "--custom-output-len=4", "--no-ignore-eos"]
    result = _measure(server, tmp_path, *flags, "--num-prompts=3", "--max-concurrency=1")
    assert [body["prompt"] for body in server.bodies] == ["one two", "three", "one two"]
    assert result["total_output_tokens"] == 12 and not any("ignore_eos" in body for body in server.bodies)


def test_prompts_of_sharegpt_have_the_length_of_their_answers(server: PlainServer, tmp_path: Path) -> None:
    """First questions that are neither too short nor too long, by the server's own tokenizer."""
    path = tmp_path / "sharegpt.json"
    talks = [["a b c", "d e f g"], ["a"], ["a", "b c"], ["long " * 600, "b c"], ["q r", "s " * 7, "t", "u"]]
    turns = [{"conversations": [{"from": "x", "value": text} for text in talk]} for talk in talks]
    path.write_text(json.dumps(turns))
    flags = ["--dataset-name=sharegpt", f"--dataset-path={path}", "--max-concurrency=1", "--num-prompts=2"]
    _measure(server, tmp_path, *flags)
    assert {(body["prompt"], body["max_tokens"]) for body in server.bodies} == {("a b c", 8), ("q r", 14)}
    path.write_text("[]")
    with pytest.raises(SystemExit):
        _measure(server, tmp_path, *flags)


def test_the_same_seed_makes_the_same_prompts_with_the_same_shared_part() -> None:
    workload = RandomWorkload(Calibration(3, 1.5), Lengths(100, 200), Lengths(1, 9), 150, seed=7)
    first, again, other = (str(workload.request(number).prompt).split() for number in (0, 0, 1))
    assert first == again and first != other
    assert first[:100] == other[:100] and first[100:110] != other[100:110]
    assert (250 - 3) / 1.5 - 1 <= len(first) <= (350 - 3) / 1.5 + 1


def test_lengths_around_another_are_as_those_of_vllm() -> None:
    assert Lengths.around(100, 0.0) == Lengths(100, 100)
    assert Lengths.around(100, 0.5) == Lengths(50, 150)
    assert Lengths.around(1, 0.9) == Lengths(1, 1)


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
    assert 0.15 < sent[-1] - sent[0] < 3


def test_burstier_arrivals_have_the_same_rate_and_more_spread() -> None:
    """The gaps themselves, as sleeping blurs them."""
    spread = {}
    for burstiness in (0.2, 1.0, 5.0):
        rng = random.Random(0)
        gaps = [pace.gap(rng, 10.0, burstiness) for _ in range(20000)]
        assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)
        spread[burstiness] = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert spread[0.2] > 1.8 * spread[1.0] > 3.2 * spread[5.0] and spread[1.0] == pytest.approx(1.0, rel=0.05)


async def test_a_server_is_found_at_an_ipv6_address() -> None:
    given = {"base_url": None, "host": "::1", "port": 9, "backend": "openai", "endpoint": None, "model": "m"}
    target = await _target(argparse.Namespace(**given, ignore_eos=False))
    assert target.server.base_url == "http://[::1]:9"
