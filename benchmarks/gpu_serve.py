"""The whole server on one GPU, over HTTP: a prefill and a decode worker against one worker that does both.

    python benchmarks/gpu_serve.py random/l1b --out gpu_serve.json

The same greedy completions from both, one after the other: the tokens must be the same, and KV must have moved between
the two workers. Then many at once: tokens per second of each. Other flags go to `pagewire serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from pagewire_bench.contestants import Contestant
from pagewire_bench.loads import Load, apply
from pagewire_bench.server_process import ServerProcess
from pagewire_bench.token_workload import TokenWorkload
from pagewire_cli.load.client import Target
from pagewire_cli.load.http import Server

LENGTHS = (1, 15, 16, 17, 100, 500, 1500)  # of prompts whose answers are compared, in tokens
OUTPUT = 64
LOADS = [Load(num_seqs, num_seqs, 512, 128) for num_seqs in (1, 32, 128)]
KINDS = {"both": ("--both", "1"), "1P1D": ("--prefill", "1", "--decode", "1")}
SERVE = (sys.executable, "-c", "from pagewire_cli.main import main; main()", "serve")  # also where nothing is installed


def completions(base_url: str, vocab_size: int) -> tuple[list[list[int]], int]:
    """The tokens of each answer, and the bytes of KV that moved for all of them."""
    tokens, moved, lanes = [], 0, set()
    for length in LENGTHS:
        prompt = TokenWorkload(vocab_size, length, OUTPUT, 0.0, "compared").request(0).prompt
        body = {"model": "model", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{base_url}/v1/completions", json=body | {"return_token_ids": True}, timeout=120)
        answer.raise_for_status()
        tokens.append(answer.json()["choices"][0]["token_ids"])
        moved += int(answer.headers.get("x-pagewire-transferred-bytes", 0))
        lanes |= {answer.headers.get("x-pagewire-lane")} - {"", None}
    print(f"    {moved} bytes of KV moved over {' and '.join(sorted(lanes)) or 'no lane'}")
    return tokens, moved


async def load(base_url: str, vocab_size: int, one: Load) -> dict[str, float]:
    found = await apply(one, Target(Server(base_url), "model"), vocab_size, f"{one.concurrency} at once")
    assert not found["errors"], found["errors"]
    rate, first_s = found["output_tokens_per_s"], found["ttft_ms"]["p50"] / 1e3
    print(
        f"    {one.concurrency:4} x {one.prompt_len}+{one.output_len}: {rate:8.0f} tok/s, first token {first_s:.2f} s"
    )
    return {"num_seqs": one.concurrency, "tokens_per_s": rate, "first_token_median_s": first_s}


def measure(kind: str, model: Path, flags: Sequence[str], vocab_size: int, logs: Path) -> dict[str, Any]:
    """Raises ServerUnfit if it does not start, httpx.HTTPStatusError if it refuses."""
    command = (*SERVE, str(model), *KINDS[kind], "--served-model-name", "model", *flags, "--port")
    server, started = ServerProcess(Contestant(kind, command), logs), time.perf_counter()
    try:
        server.wake()
        ready = time.perf_counter() - started
        print(f"  {kind}: ready after {ready:.1f} s")
        tokens, moved = completions(server.base_url, vocab_size)
        loads = [asyncio.run(load(server.base_url, vocab_size, one)) for one in LOADS]
        return {"ready_s": ready, "tokens": tokens, "moved_bytes": moved, "loads": loads}
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="The whole server on one GPU: 1P1D against one worker.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options, flags = parser.parse_known_args()
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as logs:
        results = {kind: measure(kind, options.model, flags, vocab_size, Path(logs)) for kind in KINDS}
    same = results["both"]["tokens"] == results["1P1D"]["tokens"]
    moved = results["1P1D"]["moved_bytes"]
    print(f"  the same tokens: {same}; {moved} bytes moved")
    if options.out:
        options.out.write_text(json.dumps(results | {"same": same}, indent=2) + "\n")
    if not same or not moved:
        sys.exit(1)


if __name__ == "__main__":
    main()
