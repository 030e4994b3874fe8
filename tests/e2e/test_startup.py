"""What cannot start says why in one sentence and exits with a code, before any request is taken."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from cluster import SMALL, Cluster, free_port, running, script
from tiny_models import make_model
from warm_start import SERVICES, WarmProcess

NEW_NETWORK = ("unshare", "--map-root-user", "--net")


def may_unshare() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*NEW_NETWORK, "true"], capture_output=True).returncode == 0


def run(*command: str) -> tuple[int, str]:
    """Exit code and all that was said."""
    if command[0] not in SERVICES:
        done = subprocess.run([*script(command[0]), *command[1:]], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr
    with tempfile.NamedTemporaryFile("r") as log:
        process = WarmProcess([*script(command[0]), *command[1:]], Path(log.name), os.environ)
        return process.wait(60), log.read()


def last_line(stderr: str) -> str:
    return stderr.strip().splitlines()[-1]


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "broken"))


def test_a_model_directory_that_is_not_there() -> None:
    code, stderr = run("pagewire-worker", "--model=/no/such/directory")
    assert code == 1 and "/no/such/directory" in last_line(stderr) and "Traceback" not in stderr


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    code, stderr = run("pagewire-worker", f"--model={tmp_path}")
    assert code == 1 and "config.json" in last_line(stderr) and "Traceback" not in stderr


def test_a_config_that_is_not_json(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    code, stderr = run("pagewire-worker", f"--model={broken}")
    assert code == 1 and "config.json" in last_line(stderr) and "Traceback" not in stderr


def test_an_architecture_that_is_not_supported(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["BloomForCausalLM"]}))
    code, stderr = run("pagewire-worker", f"--model={broken}")
    assert code == 1 and "BloomForCausalLM is not supported; supported are Llama" in last_line(stderr)


def test_weights_cut_short(broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, stderr = run("pagewire-worker", f"--model={broken}")
    assert code == 1 and "download the model again" in last_line(stderr) and "Traceback" not in stderr


def test_a_pool_that_holds_no_sequence(llama: Path) -> None:
    code, stderr = run("pagewire-worker", f"--model={llama}", "--kv-cache-memory-bytes=64K")
    assert code == 1 and "lower --max-model-len or raise --kv-cache-memory-bytes" in last_line(stderr)


@pytest.mark.parametrize("program", ["pagewire-worker", "pagewire-router", "pagewire-bridge"])
def test_a_port_in_use(program: str, llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        extra = {
            "pagewire-worker": [f"--model={llama}"],
            "pagewire-router": [f"--model={llama}", "--workers=127.0.0.1:1"],
            "pagewire-bridge": ["--router=127.0.0.1:1"],
        }[program]
        code, stderr = run(program, *extra, f"--port={port}")
    assert code == 1 and str(port) in last_line(stderr) and "Traceback" not in stderr


def test_a_redis_that_cannot_be_reached(llama: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, stderr = run("pagewire", "serve", str(llama), f"--redis-url=redis://{address}/0", f"--port={free_port()}")
    assert code == 1 and f"cannot reach Redis at {address}" in last_line(stderr) and "Traceback" not in stderr


@pytest.mark.skipif(not may_unshare(), reason="network namespaces are not allowed here")
def test_a_loopback_that_is_down(llama: Path) -> None:
    """As in a network namespace that was just made: serve once waited for its services, which nobody could reach."""
    command = [*NEW_NETWORK, *script("pagewire"), "serve", str(llama), f"--port={free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "127.0.0.1, which cannot be reached: Network is unreachable" in done.stderr


@pytest.mark.parametrize("program", ["pagewire-worker", "pagewire-router"])
def test_a_service_whose_redis_is_not_there_does_not_start(program: str, llama: Path) -> None:
    """A worker that nobody can find would look healthy and never get a request."""
    address = f"127.0.0.1:{free_port()}"
    code, stderr = run(program, f"--model={llama}", f"--redis-url=redis://{address}/0")
    assert code == 1 and f"cannot reach Redis at {address}" in last_line(stderr) and "Traceback" not in stderr


@pytest.mark.parametrize("flag", ["--data-parallel-size=2", "--no-such-flag", "--quantization=awq", "--max-num-seqs=0"])
def test_a_flag_that_is_unknown_or_not_implemented(flag: str, llama: Path) -> None:
    code, stderr = run("pagewire", "serve", str(llama), flag)
    assert code == 2 and flag.partition("=")[0] in last_line(stderr)


async def test_a_worker_with_another_model_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    """It would fill pages with another model's KV; the router says so once and goes on without it."""
    other = make_model(tmp_path / "other", "llama", seed=1)
    async with running(Cluster(llama, tmp_path)) as cluster:
        stranger = cluster.add_worker("decode", flags=[f"--model={other}"])
        await cluster.wait_serving(stranger)

        async def refused() -> bool:
            return "serves other weights" in cluster.processes["router"].log.read_text()

        await cluster.until(refused, "the router did not say that it refuses the worker")
        assert len([w for w in (await cluster.status()).workers if w.ready]) == 2
        assert (await cluster.complete("hello"))["choices"][0]["token_ids"]


async def test_a_worker_with_another_kv_dtype_is_never_paired(llama: Path, tmp_path: Path) -> None:
    """float32 prefill and bfloat16 decode: the KV of one means nothing to the other."""
    async with running(Cluster(llama, tmp_path)) as cluster:
        odd = cluster.add_worker("decode", flags=[*SMALL, "--dtype=bfloat16"])
        await cluster.wait_serving(odd)
        await cluster.wait_workers(3)
        cluster.processes["decode-0"].stop()
        await cluster.wait_workers(2)
        answer = await cluster.complete("hello there")
        assert answer["usage"]["completion_tokens"] == 12
        totals = await cluster.metrics()
        assert totals["decode:pagewire_engine_prompt_tokens_computed_total"] == 11
