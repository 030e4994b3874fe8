"""What the hand-off adds for a client: times to the first and to the second token, by arrangement and network.

Workers, router and client are processes of their own, each worker with one core's thread, so that the difference is the
hand-off and not the cores. Run as a module it is the client: it asks a router and prints what it saw as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from pagewire_cli.ports import free_ports
from pagewire_core.rpc import open_channel

_START_S = 120.0
_FLAGS = ("--threads=1", "--max-num-seqs=4", "--kv-cache-memory-bytes=512M", "--log-level=warning")

Figures = dict[str, float]


def measure(
    model: Path, prompts: dict[int, int], *, pair: bool, lanes: str = "auto", network: Sequence[str] = ()
) -> dict[int, list[Figures]]:
    """By prompt tokens, one entry for each of so many repeats. network: two namespaces, or none: one host."""
    prefixes = [["ip", "netns", "exec", name] for name in network] or [[], []]
    hosts = ["10.77.0.1", "10.77.0.2"] if network else ["127.0.0.1"] * 2
    roles = ["prefill", "decode"] if pair else ["both"]
    ports = free_ports(len(roles) + 1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as running:
        log = running.enter_context((Path(name) / "log").open("wb"))
        workers = [
            f"{host}:{port}" for host, port in zip(hosts[-len(roles) :] if not pair else hosts, ports, strict=False)
        ]
        for role, address, prefix in zip(roles, workers, prefixes if pair else prefixes[1:], strict=True):
            host, _, port = address.rpartition(":")
            running.enter_context(_running([
                *prefix, _script("pagewire-worker"), f"--role={role}", f"--model={model}", f"--host={host}",
                f"--port={port}", f"--lanes={lanes}", f"--max-model-len={max(prompts) + 16}", *_FLAGS,
            ], log))  # fmt: skip
        running.enter_context(_running([
            *prefixes[1], _script("pagewire-router"), f"--model={model}", f"--host={hosts[1]}", f"--port={ports[-1]}",
            f"--workers={','.join(workers)}", "--log-level=warning", "--routing-policy=prefix",  # always a pair
        ], log))  # fmt: skip
        command = [*prefixes[1], sys.executable, "-m", "pagewire_bench.wire_tokens", f"{hosts[1]}:{ports[-1]}",
                   str(len(workers)), json.dumps(prompts)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
        if done.returncode:
            raise RuntimeError(f"{done.stderr[-2000:]}\n{Path(log.name).read_text()[-2000:]}")
        seen: dict[str, list[Figures]] = json.loads(done.stdout)
        return {int(tokens): figures for tokens, figures in seen.items()}


@contextlib.contextmanager
def _running(command: list[str], log: Any) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


async def _ask_all(router: str, num_workers: int, prompts: dict[int, int]) -> dict[int, list[Figures]]:
    rng = random.Random(0)
    async with open_channel(router) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await _until_ready(stub, num_workers)
        for _ in range(2):
            await _ask(stub, 64, rng)
        found: dict[int, list[Figures]] = {tokens: [] for tokens in prompts}
        for tokens, repeats in prompts.items():
            for _ in range(repeats):
                found[tokens].append(await _ask(stub, tokens, rng))
        return found


async def _until_ready(stub: inference_pb2_grpc.InferenceServiceStub, num_workers: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(grpc.RpcError):
            status = await stub.Status(inference_pb2.StatusRequest(), timeout=2)
            if sum(worker.ready for worker in status.workers) == num_workers:
                return
        await asyncio.sleep(0.2)
    raise TimeoutError(f"{num_workers} workers were not ready in {_START_S:.0f} s")


async def _ask(stub: inference_pb2_grpc.InferenceServiceStub, num_tokens: int, rng: random.Random) -> Figures:
    """One prompt of random tokens, alone in the system."""
    ids = inference_pb2.TokenIds(ids=[rng.randrange(100, 400) for _ in range(num_tokens)])
    sampling = common_pb2.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    began, seen = time.perf_counter(), []
    async for response in stub.Generate(inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling)):
        seen += [time.perf_counter() - began] * len(response.delta.tokens)
        if response.HasField("error"):
            raise RuntimeError(response.error.message)
        if response.HasField("summary"):
            summary = response.summary
    timings = summary.timings
    return {
        "first_ms": 1e3 * seen[0],
        "second_ms": 1e3 * seen[1],
        "prefill_ms": timings.prefill_us / 1e3,
        "transfer_ms": timings.transfer_us / 1e3,
        "tail_ms": timings.kv_tail_us / 1e3,
        "overlap": summary.kv_overlap,
        "bytes": summary.transferred_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("router")
    parser.add_argument("num_workers", type=int)
    parser.add_argument("prompts", type=lambda text: {int(k): int(v) for k, v in json.loads(text).items()})
    args = parser.parse_args()
    print(json.dumps(asyncio.run(_ask_all(args.router, args.num_workers, args.prompts))))


if __name__ == "__main__":
    main()
