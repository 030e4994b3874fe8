"""What router and bridge cost, with workers that give tokens at a fixed pace; beside other gateways, in one run.

    python -m venv peers/gateways
    peers/gateways/bin/pip install 'litellm[proxy]==1.105.0' sglang-router==0.3.2
    python benchmarks/frontend.py --peers peers/gateways --out benchmarks/results/frontend.json

pagewire's workers speak its own contract; behind the others is an OpenAI server of the same pace, which is also
measured alone ("nothing"). In every round each front end has its turn. Told are the time to first token beyond the
pace's own, tokens for each second of CPU that the front end's processes take, and the memory that they take for a
stream which waits for its next token. Short answers show what a request costs, long ones what a token costs. What is
not in --peers is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop
from pagewire_bench.frontends import FRONTENDS, installed, started
from pagewire_bench.paced import Pace
from pagewire_bench.stream_load import Load, held, run
from rich.console import Console
from rich.table import Table

PACE = Pace(ttft_s=0.05, itl_s=0.1)
HALTED = Pace(ttft_s=0.05, itl_s=600.0)  # nothing comes after a first token
FIGURES = {
    "added_ttft_p50_ms": "added TTFT p50 (ms)",
    "added_ttft_p99_ms": "p99 (ms)",
    "tokens_per_cpu_s": "tokens per CPU second",
    "cores": "cores",
    "kib_per_idle_stream": "KiB per idle stream",
    "errors": "errors",
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what runs is ended, too
    runs: list[dict[str, Any]] = []
    for number in range(args.rounds):
        for name in args.frontends or installed(args.peers):
            runs += uvloop.run(measure(name, args, number))
            if args.out:
                args.out.write_text(json.dumps(result(runs, args), indent=1) + "\n")
    Console(width=140).print(table(result(runs, args)["medians"]))


async def measure(name: str, args: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """One turn of a front end: every number of streams, and then streams that are held."""
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        directory, make = Path(scratch), FRONTENDS[name]
        async with started(make(PACE, args.peers, directory), directory) as (url, processes):
            await run(url, Load(4, 16, 3.0), PACE)  # warm
            for streams, tokens in itertools.product(args.streams, args.tokens):
                begin, at = _cpu_s(processes), asyncio.get_running_loop().time()
                measured = await run(url, Load(streams, tokens, args.seconds), PACE)
                cpu_s, wall_s = _cpu_s(processes) - begin, asyncio.get_running_loop().time() - at
                added_ms = sorted((ttft_s - PACE.ttft_s) * 1e3 for ttft_s in measured.ttft_s)
                runs.append({
                    "frontend": name, "round": number, "streams": streams, "tokens": tokens, "answers": len(added_ms),
                    "errors": len(measured.errors), "example_error": (measured.errors or [""])[0],
                    "added_ttft_p50_ms": _quantile(added_ms, 0.5), "added_ttft_p99_ms": _quantile(added_ms, 0.99),
                    "tokens_per_cpu_s": measured.num_tokens / cpu_s if cpu_s else None, "cores": cpu_s / wall_s,
                })  # fmt: skip
                print(json.dumps(runs[-1]), flush=True)
        kib = await _kib_per_idle_stream(name, args.peers, directory, max(args.streams))
    return [{**one, "kib_per_idle_stream": kib} for one in runs]


async def _kib_per_idle_stream(name: str, peers: Path, directory: Path, num_streams: int) -> float | None:
    async with started(FRONTENDS[name](HALTED, peers, directory), directory) as (url, processes):
        if not processes:
            return None
        async with held(url, 8):  # what the first streams take once
            before = _memory(processes)
        try:
            async with held(url, num_streams):
                return (_memory(processes) - before) / num_streams / 1024
        except TimeoutError:  # it does not get that far with so many
            return None


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _memory(processes: Sequence[psutil.Process]) -> int:
    return sum(process.memory_full_info().uss for process in processes)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def result(runs: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Runs, and medians over the rounds by front end and load: "streams x tokens of each"."""
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(one["frontend"] for one in runs):
        for load in itertools.product(args.streams, args.tokens):
            some = [one for one in runs if (one["frontend"], one["streams"], one["tokens"]) == (name, *load)]
            values = {key: [one[key] for one in some if one[key] is not None] for key in FIGURES}
            found = {key: statistics.median(of) for key, of in values.items() if of}
            medians.setdefault(name, {})["{} x {}".format(*load)] = found
    pace = {"ttft_ms": PACE.ttft_s * 1e3, "itl_ms": PACE.itl_s * 1e3}
    machine = {"cores": os.cpu_count(), "load_average": os.getloadavg()}
    return {"pace": pace, "seconds": args.seconds, "machine": machine, "medians": medians, "runs": list(runs)}


def table(medians: dict[str, dict[str, dict[str, float]]]) -> Table:
    shown = Table("front end", "streams x tokens", *FIGURES.values())
    for name, by_load in medians.items():
        for load, found in by_load.items():
            shown.add_row(name, load, *(f"{found[key]:.4g}" if key in found else "-" for key in FIGURES))
    return shown


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=Path, default=Path("peers/gateways"), help="virtual environment of the gateways"
    )
    parser.add_argument("--frontends", nargs="+", choices=list(FRONTENDS), help="default: all that are there")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 128, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128], help="of each answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="for which new answers of a load are begun")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
