"""The whole server on one GPU, over HTTP: a prefill and a decode worker against one worker that does both.

    python benchmarks/gpu_serve.py random/l1b --out gpu_serve.json

The same greedy completions from both, one after the other: the text must be the same, and KV must have moved between
the two workers. Then many at once: tokens per second of each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

URL = "http://127.0.0.1:8000"
LENGTHS = (1, 15, 16, 17, 100, 500, 1500)  # of prompts whose answers are compared, in tokens
KINDS = {"both": ("--both", "1"), "1P1D": ("--prefill", "1", "--decode", "1")}


def prompt_of(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, vocab_size) for _ in range(num_tokens)]


def body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip


def completions(client: httpx.Client, vocab_size: int) -> tuple[list[list[int]], int]:
    """The tokens of each answer, and the bytes of KV that moved for all of them."""
    tokens, moved = [], 0
    for seed, length in enumerate(LENGTHS):
        answer = client.post("/v1/completions", json=body(prompt_of(length, vocab_size, seed), 64))
        assert answer.status_code == 200, answer.text
        tokens.append(answer.json()["choices"][0]["token_ids"])
        moved += int(answer.headers.get("x-pagewire-transferred-bytes", 0))
        lane = answer.headers.get("x-pagewire-lane")
    print(f"    {moved} bytes of KV moved over {lane}")
    return tokens, moved


async def load(vocab_size: int, num_seqs: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
    """`num_seqs` requests that come at once."""
    first: list[float] = []

    async def one(client: httpx.AsyncClient, seed: int) -> None:
        request = body(prompt_of(prompt_tokens, vocab_size, seed), output_tokens) | {"stream": True}
        async with client.stream("POST", "/v1/completions", json=request) as answer:
            lines = answer.aiter_lines()
            assert answer.status_code == 200, await answer.aread()
            await anext(lines)
            first.append(time.perf_counter() - started)
            async for line in lines:
                assert "error" not in line, line

    async with httpx.AsyncClient(base_url=URL, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one(client, 1000 * num_seqs + seed) for seed in range(num_seqs)))
        seconds = time.perf_counter() - started
    rate = num_seqs * output_tokens / seconds
    print(f"    {num_seqs:4} x {prompt_tokens}+{output_tokens}: {rate:8.0f} tok/s, first token {median(first):.2f} s")
    return {"num_seqs": num_seqs, "tokens_per_s": rate, "first_token_median_s": median(first)}


def measure(kind: str, model: Path, flags: list[str], vocab_size: int) -> dict[str, Any]:
    command = [sys.executable, "-c", "from pagewire_cli.main import main; main()", "serve", str(model), *KINDS[kind],
               "--served-model-name", "m", "--port", "8000", *flags]  # fmt: skip
    started = time.perf_counter()
    server = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=URL, timeout=120) as client:
            while True:
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if server.poll() is not None or time.perf_counter() - started > 180:
                    raise RuntimeError("the server did not start")
                time.sleep(0.2)
            ready = time.perf_counter() - started
            print(f"  {kind}: ready after {ready:.1f} s")
            tokens, moved = completions(client, vocab_size)
        loads = [asyncio.run(load(vocab_size, n, 512, 128)) for n in (1, 32, 128)]
        return {"ready_s": ready, "tokens": tokens, "moved_bytes": moved, "loads": loads}
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole server on one GPU: 1P1D against one worker.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options, flags = parser.parse_known_args()
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    results = {kind: measure(kind, options.model, flags, vocab_size) for kind in KINDS}
    same = results["both"]["tokens"] == results["1P1D"]["tokens"]
    moved = results["1P1D"]["moved_bytes"]
    print(f"  the same tokens: {same}; {moved} bytes moved")
    if options.out:
        options.out.write_text(json.dumps(results | {"same": same}, indent=2) + "\n")
    if not same or not moved:
        sys.exit(1)


if __name__ == "__main__":
    main()
