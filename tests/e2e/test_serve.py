"""`pagewire serve` as a newcomer uses it: the demo model, the official client, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import pytest_asyncio
from pagewire_cli import gpus
from pagewire_core.machine import available_cpus
from processes import free_port, lives, script

pytestmark = pytest.mark.asyncio(loop_scope="module")
SERVICES = {"redis", "prefill-0", "decode-0", "router", "bridge"}


@dataclass
class Served:
    popen: subprocess.Popen[str]
    state: dict[str, Any]
    output: Path
    client: openai.AsyncOpenAI

    def pids(self) -> dict[str, int]:
        return {service["name"]: service["pid"] for service in self.state["services"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory = tmp_path_factory.mktemp("serve")
    state, output = directory / "state.json", directory / "output.txt"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PAGEWIRE_")} | {"XDG_STATE_HOME": str(directory)}
    config = directory / "pagewire.yaml"
    config.write_text(f"state_file: {state}\nport: 1\n")  # the command line has another port, and wins
    command = [*script("pagewire"), "serve", f"--config={config}", f"--port={free_port()}"]
    with output.open("w") as out:
        popen = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        for _ in range(600):
            if state.exists() or popen.poll() is not None:
                break
            await asyncio.sleep(0.1)
        assert state.exists(), output.read_text()
        facts = json.loads(state.read_text())
        client = openai.AsyncOpenAI(base_url=facts["base_url"] + "/v1", api_key="none", max_retries=0)
        async with client:
            yield Served(popen, facts, output, client)
    finally:
        if popen.poll() is None:
            popen.kill()


async def test_every_service_is_announced_with_its_time_and_the_curl_line_works(served: Served) -> None:
    text = served.output.read_text()
    for name in SERVICES:
        assert re.search(rf"{name}\b.*\d+\.\d+ ?s", text), f"no line for {name} in:\n{text}"
    curl = text[text.index("curl") :].strip()
    done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"], done


async def test_prompt_and_answer_were_computed_in_different_processes(served: Served) -> None:
    """Unless the router finds, from step times of a machine that is busy, that the decode worker is done sooner."""
    for attempt in range(20):
        response = await served.client.chat.completions.with_raw_response.create(
            model="pagewire-demo",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            extra_body={"cache_salt": f"attempt {attempt}"},
        )
        answer = response.parse()
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop"
        if response.headers["x-pagewire-prefill-worker"]:
            break
    assert response.headers["x-pagewire-prefill-worker"].startswith("prefill")
    assert response.headers["x-pagewire-decode-worker"].startswith("decode")
    assert answer.usage is not None
    moved = int(response.headers["x-pagewire-transferred-bytes"])
    assert 0 < moved == answer.usage.prompt_tokens * 1280
    assert len(set(served.pids().values())) == len(SERVICES) == len(served.pids())


async def test_a_streamed_story_is_the_whole_one(served: Served) -> None:
    ask: dict[str, Any] = {
        "model": "pagewire-demo", "temperature": 0, "max_tokens": 120,
        "messages": [{"role": "user", "content": "Tell me a story about a fox and a child who lives near the market."}],
    }  # fmt: skip
    whole = await served.client.chat.completions.create(**ask)
    parts, usage = [], None
    async for chunk in await served.client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ):
        parts += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    text = whole.choices[0].message.content or ""
    assert "".join(parts) == text and len(text.split()) > 20
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens


async def test_pagewire_bench_measures_it(served: Served, tmp_path: Path) -> None:
    """Lengths are exact on a server that says how many tokens there are, and KV has moved.

    So many prompts that some do on any machine: a prefill worker that looks slow is tried again after 16.
    """
    path = tmp_path / "result.json"
    command = [*script("pagewire"), "bench", f"--base-url={served.state['base_url']}", "--num-prompts=24"]
    command += ["--max-concurrency=2", "--random-input-len=64", "--random-output-len=12", "--random-prefix-len=32"]
    process = await asyncio.create_subprocess_exec(
        *command, "--save-result", f"--result-filename={path}", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0 and b"Mean TPOT (ms):" in out
    result = json.loads(path.read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (24, 0, 288)
    assert result["total_input_tokens"] / 24 == pytest.approx(96, rel=0.15)
    assert result["kv_transfer"]["bytes"] > 0 and 0 < result["cached_tokens_share"] < 1
    assert 0 < result["median_tpot_ms"] and result["median_ttft_ms"] < result["median_e2el_ms"]


async def test_pagewire_sizing_reckons_with_what_it_measured(served: Served) -> None:
    """The demo model on any machine: one worker of each kind does one request a minute, and a million need more."""
    flags = ["--prompt-tokens=64", "--output-tokens=16", "--ttft=60000", "--itl=60000"]
    command = [*script("pagewire"), "sizing", f"--router={served.state['router']}", *flags, "--request-rate"]
    few, many = (
        subprocess.run([*command, rate], capture_output=True, text=True, timeout=60) for rate in ("0.02", "1e6")
    )
    assert few.stdout.startswith("Costs as measured: prompts by 1, decoding by 1 workers.\n"), few
    assert "\nprefill workers: 1\n" in few.stdout and "\ndecode workers: 1\n" in few.stdout
    assert "its KV       0.1 MB" in few.stdout, "1280 bytes a token"
    assert many.returncode == 0 and "\nprefill workers: 1\n" not in many.stdout


async def test_a_conversation_reuses_its_prefix(served: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me a story about Mia and a fox at the river."}]
    first = await served.client.chat.completions.create(model="pagewire-demo", messages=messages, temperature=0)
    messages += [first.choices[0].message.model_dump(include={"role", "content"}),
                 {"role": "user", "content": "What is the capital of Japan?"}]  # fmt: skip
    second = await served.client.chat.completions.create(model="pagewire-demo", messages=messages, temperature=0)
    assert second.choices[0].message.content == "The capital of Japan is Tokyo."
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens


async def test_log_probabilities_of_chosen_and_best_tokens_cross_the_hand_off(served: Served) -> None:
    """The first token is sampled by one worker and the others by another; all must carry them."""
    answer = await served.client.chat.completions.create(
        model="pagewire-demo", messages=[{"role": "user", "content": "What is the capital of Japan?"}],
        temperature=0, logprobs=True, top_logprobs=3, n=2,
    )  # fmt: skip
    assert [choice.message.content for choice in answer.choices] == ["The capital of Japan is Tokyo."] * 2
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        text = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert text.decode().startswith("The capital of Japan is Tokyo.")
        for token in choice.logprobs.content:
            values = [top.logprob for top in token.top_logprobs]
            assert values == sorted(values, reverse=True) and len(values) == 3
            assert token.logprob == values[0] and token.token == token.top_logprobs[0].token


async def test_a_text_is_judged_without_a_word_of_an_answer(served: Served) -> None:
    """As evaluation harnesses ask: echo, log probabilities and no tokens; whole, and as a stream."""
    text = "The capital of Japan is Tokyo."
    ask: dict[str, Any] = {
        "model": "pagewire-demo",
        "prompt": [text, text],
        "echo": True,
        "logprobs": 2,
        "max_tokens": 0,
    }
    answer = await served.client.completions.create(**ask)
    first, second = answer.choices
    told = first.logprobs
    assert told is not None and told == second.logprobs and first.text == text and first.finish_reason == "length"
    assert told.tokens is not None and told.token_logprobs is not None and told.text_offset is not None
    assert all(text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True))
    assert "".join(told.tokens) == text and told.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in told.token_logprobs[1:])
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    chunks = [chunk.choices[0] async for chunk in await served.client.completions.create(**ask, stream=True)]
    assert [c.logprobs for c in chunks if c.logprobs] == [told] * 2
    generated = await served.client.completions.create(**(ask | {"max_tokens": 5, "prompt": text, "temperature": 0}))
    assert generated.choices[0].logprobs is not None and generated.choices[0].logprobs.tokens is not None
    assert generated.choices[0].logprobs.tokens[: len(told.tokens)] == told.tokens
    assert len(generated.choices[0].logprobs.tokens) == len(told.tokens) + 5


async def test_no_part_of_a_stop_string_gets_out(served: Served) -> None:
    ask: dict[str, Any] = {"model": "pagewire-demo", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60}
    full = (await served.client.completions.create(**ask)).choices[0].text
    stop = full[20:27]  # across several tokens
    stopped = (await served.client.completions.create(**ask, stop=[stop])).choices[0]
    assert (stopped.text, stopped.finish_reason) == (full[: full.index(stop)], "stop")
    streamed = [c.choices[0].text async for c in await served.client.completions.create(**ask, stop=stop, stream=True)]
    assert "".join(streamed) == full[: full.index(stop)]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-5"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, 400, "messages"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tool_choice"),
    ],
)
async def test_bad_input_has_openais_error_object(served: Served, change: Any, status: int, param: str) -> None:
    ask: Any = {"model": "pagewire-demo", "messages": [{"role": "user", "content": "hi"}]} | change
    with pytest.raises(openai.APIStatusError) as caught:
        await served.client.chat.completions.create(**ask)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert body["param"] == param and body["message"] and set(body) == {"message", "type", "param", "code"}
    if param in ("max_tokens", "messages") and change.get("messages") != []:
        assert "maximum context length" in body["message"]


async def test_metrics_of_every_process_are_on_the_bridge(served: Served) -> None:
    import httpx

    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(served.state["base_url"] + "/metrics")).text
    for name in ("pagewire_kv_transfer_bytes_total", "pagewire_engine_tokens_sampled_total",
                 "pagewire_time_to_first_token_seconds_bucket", "pagewire_stage_seconds_count"):  # fmt: skip
        assert name in text
    for role in ("prefill", "decode"):
        assert re.search(rf'pagewire_engine_steps_total{{.*instance="{role}[^"]*".*}} [1-9]', text)


@pytest.mark.skipif(sys.platform != "linux" or len(available_cpus()) < 2, reason="needs Linux and two cores")
async def test_a_prompt_is_computed_on_the_idle_decode_workers_core_too(served: Served) -> None:
    """Each worker had half of the machine for ever, and the other half idled beside it."""
    import httpx

    story = "Tell me a story about a fox who finds a kite and a boat and a bell and then brings them all home."
    await served.client.completions.create(model="pagewire-demo", prompt=story, max_tokens=1)
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(served.state["base_url"] + "/metrics")).text
    assert re.search(r'pagewire_engine_cores_borrowed_total{.*instance="prefill[^"]*".*} [1-9]', text)


@pytest.mark.skipif(sys.platform != "linux" or bool(gpus.seen("auto", os.environ)), reason="for steps on Linux' CPUs")
async def test_no_service_that_wakes_up_takes_the_core_of_a_step_at_once(served: Served) -> None:
    """A step waited for the thread that had lost its core until a token was on its way."""
    assert {os.sched_getscheduler(pid) for pid in served.pids().values()} == {os.SCHED_BATCH}


async def test_the_example_client_speaks_the_native_api(served: Served) -> None:
    example = Path(__file__).parents[2] / "examples/grpc_client.py"
    done = subprocess.run(
        [sys.executable, str(example), "--temperature=0", "--router", served.state["router"],
         "What is the capital of Japan?"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Tokyo" in done.stdout, done


async def test_ctrl_c_stops_everything(served: Served) -> None:
    """The last of this module: afterwards no process is left."""
    children = psutil.Process(served.popen.pid).children(recursive=True)
    assert len(children) >= len(SERVICES)
    served.popen.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(served.popen.wait, 60) == 0
    assert not [child for child in children if lives(child)]
