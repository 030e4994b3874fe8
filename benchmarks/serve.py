"""Load generator for any server with an OpenAI API: see benchmarks/README.md.

python benchmarks/serve.py --base-url http://127.0.0.1:8000 --concurrency 8 --num-requests 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from pagewire_bench import pace, report
from pagewire_bench.client import ENDPOINTS, Outcome, ServerUnfit, Target
from pagewire_bench.workload import Workload, lengths
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_REQUEST_TIMEOUT_S = 600.0
_NUM_REQUESTS = 64


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measures an OpenAI-compatible server.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="without /v1")
    parser.add_argument("--model", help="default: the first one the server lists")
    parser.add_argument("--endpoint", choices=ENDPOINTS, default="completions")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=_positive, default=4, metavar="N", help="requests in flight")
    load.add_argument("--request-rate", type=_positive_float, metavar="R", help="Poisson arrivals per second, instead")
    parser.add_argument(
        "--num-requests", type=_positive, metavar="N", help=f"default: {_NUM_REQUESTS}, or no limit with --duration"
    )
    parser.add_argument("--duration", type=_positive_float, metavar="S", help="send no more after this many seconds")
    parser.add_argument("--prompt-len", type=lengths, default="128", metavar="N|A:B", help="prompt tokens")
    parser.add_argument("--output-len", type=lengths, default="64", metavar="N|A:B", help="output tokens")
    parser.add_argument("--shared-prefix-share", type=_share, default=0.0, metavar="F", help="part common to all, 0..1")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="requests sent before, not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the results there as JSON")
    return parser


async def _get(client: httpx.AsyncClient, path: str) -> str | None:
    """The body, or None where the server has no such path."""
    try:
        response = await client.get(path)
    except httpx.HTTPError:
        return None
    return response.text if response.status_code == httpx.codes.OK else None


def _version(text: str | None) -> str | None:
    try:
        return str(json.loads(text or "")["version"])
    except (ValueError, LookupError, TypeError):
        return None


async def _first_model(client: httpx.AsyncClient) -> str:
    listed = await _get(client, "/v1/models")
    try:
        return str(json.loads(listed or "")["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ServerUnfit(f"{client.base_url} lists no models; is it up? Else name one with --model") from None


async def _measure(
    args: argparse.Namespace, target: Target, workload: Workload, progress: Progress
) -> tuple[list[Outcome], float]:
    """What became of every request, and the seconds from the first one's start to the last one's end."""
    total = args.num_requests or (None if args.duration else _NUM_REQUESTS)
    sending = progress.add_task("requests", total=total)

    async def send(index: int) -> Outcome:
        outcome = await target.complete(workload.request(index))
        progress.advance(sending)
        return outcome

    started = time.perf_counter()
    numbers = pace.indices(total, args.duration)
    if args.request_rate:
        outcomes = await pace.arrive_at(args.request_rate, args.seed, numbers, send)
    else:
        outcomes = await pace.keep_in_flight(args.concurrency, numbers, send)
    return outcomes, time.perf_counter() - started


async def _warm_up(args: argparse.Namespace, target: Target, workload: Workload, progress: Progress) -> None:
    warming = progress.add_task("warm-up", total=args.warmup)
    for index in range(args.warmup):
        await target.complete(workload.request(-1 - index))
        progress.advance(warming)


async def _run_on(args: argparse.Namespace, client: httpx.AsyncClient) -> dict[str, Any]:
    target = Target(client, args.model or await _first_model(client), args.endpoint)
    calibration = await target.calibrate(args.seed)
    workload = Workload(calibration, args.prompt_len, args.output_len, args.shared_prefix_share, args.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        await _warm_up(args, target, workload, progress)
        before = await _get(client, "/metrics")
        outcomes, wall_s = await _measure(args, target, workload, progress)
    after = await _get(client, "/metrics")
    configuration = {key: getattr(value, "__dict__", value) for key, value in vars(args).items() if key != "out"}
    return {
        "configuration": {**configuration, "model": target.model, "tokens_per_word": calibration.per_word},
        "server": {"version": _version(await _get(client, "/version")), "is_pagewire": "pagewire_" in (after or "")},
        "machine": report.machine(),
        "results": {
            **report.summarise(outcomes, wall_s),
            "transfer": report.transfer(before, after, outcomes),
        },
    }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement: configuration, machine and results. Raises ServerUnfit, httpx.HTTPError."""
    key = os.environ.get("OPENAI_API_KEY")
    async with httpx.AsyncClient(
        base_url=args.base_url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=_REQUEST_TIMEOUT_S,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    ) as client:
        return await _run_on(args, client)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes --out. Exit code 1: nothing could be measured, and one sentence says why."""
    args = _parser().parse_args(argv)
    if args.request_rate:
        args.concurrency = None
    try:
        measured = asyncio.run(run(args))
    except (ServerUnfit, httpx.HTTPError) as error:
        sys.exit(f"serve.py: {error or type(error).__name__}")
    configuration = measured["configuration"]
    load = f"{args.request_rate} requests/s" if args.request_rate else f"{args.concurrency} in flight"
    report.print_table(f"{configuration['model']} at {args.base_url}, {load}", measured["results"])
    if args.out:
        args.out.write_text(json.dumps(measured, indent=2) + "\n")
    if not measured["results"]["completed"]:
        sys.exit("serve.py: no request completed")


if __name__ == "__main__":
    main()
