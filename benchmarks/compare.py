"""pagewire against the other servers that are installed, over HTTP: same weights, precision, threads and loads.

    python benchmarks/compare.py MODEL --llama-server llama-server --vllm-python vllm-env/bin/python --out result.json

MODEL is a directory with a checkpoint and the forms of it that llama.cpp and vLLM read (make_model.py writes all). In
each round every server has its turn alone: started or woken, warmed up, put under every load, stopped or halted. The
order turns from round to round. Prints medians over the rounds, their spread, and pagewire over the best of the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from pagewire_bench import contestants
from pagewire_bench.contestants import OURS, PRECISIONS, Contestant, Setting
from pagewire_bench.loads import LOADS, QUICK_LOADS, Load, apply, warm_up
from pagewire_bench.ratios import FIGURES, table
from pagewire_bench.server_process import ServerProcess
from pagewire_cli.load import report
from pagewire_cli.load.client import ServerUnfit, Target
from pagewire_cli.load.http import Server
from rich.console import Console
from tokenizers import Tokenizer

_SPARE_LEN = 16  # tokens of a slot beyond prompt and answer
Runs = dict[str, dict[str, list[dict[str, Any]]]]  # by contestant, by load, one for each round


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--ours", nargs="*", choices=OURS, default=list(OURS), help="default: both arrangements")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), metavar="PATH", help="default: on PATH")
    parser.add_argument("--vllm-python", metavar="PATH", help="the interpreter that has vLLM")
    parser.add_argument("--transformers", action="store_true", help="compare with transformers of this interpreter")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--rounds", type=int, help="default: 3, or 1 with --quick")
    names = "; ".join(LOADS).replace("%", "%%")  # of a help text a format is made
    parser.add_argument("--loads", nargs="+", choices=LOADS, metavar="LOAD", help=f"of: {names}")
    parser.add_argument("--quick", action="store_true", help="a few short loads")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the results there as JSON")
    return parser


def _loads(args: argparse.Namespace) -> dict[str, Load]:
    chosen = args.loads or (QUICK_LOADS if args.quick else LOADS)
    return {name: LOADS[name].quick() if args.quick else LOADS[name] for name in chosen}


def _contestants(args: argparse.Namespace, loads: dict[str, Load], precision: str) -> list[Contestant]:
    setting = Setting(
        model=args.model.absolute(),
        precision=precision,
        threads=args.threads,
        slots=max(32, *(load.concurrency for load in loads.values())),  # the warm-up has 32
        max_len=max(load.context for load in loads.values()) + _SPARE_LEN,
        total_tokens=max(load.concurrency * load.context for load in loads.values()),
    )
    found: dict[str, Contestant | None] = {name: contestants.pagewire(setting, name) for name in args.ours}
    if args.llama_server:
        found["llama.cpp"] = contestants.llama_cpp(setting, args.llama_server)
    if args.vllm_python:
        found["vLLM"] = contestants.vllm(setting, args.vllm_python)
    if args.transformers:
        found["transformers"] = contestants.transformers(setting, sys.executable)
    for name in (name for name, contestant in found.items() if contestant is None):
        print(f"{name} is left out: it has no {precision} form of {args.model}", file=sys.stderr)
    return [contestant for contestant in found.values() if contestant is not None]


async def _turn(server: ServerProcess, loads: dict[str, Load], num_tokens: int, seed: str) -> dict[str, dict[str, Any]]:
    """Every load once, on a server that is awake."""
    longest = max(load.context for load in loads.values())
    target = Target(Server(server.base_url), server.contestant.model)
    await warm_up(target, num_tokens, longest, seed)
    return {name: await apply(load, target, num_tokens, f"{seed}/{name}") for name, load in loads.items()}


def _run_rounds(args: argparse.Namespace, servers: list[ServerProcess], loads: dict[str, Load]) -> Runs:
    num_tokens = Tokenizer.from_file(str(args.model / "tokenizer.json")).get_vocab_size()
    runs: Runs = {server.contestant.name: {load: [] for load in loads} for server in servers}
    for number in range(args.rounds):
        first = number % len(servers)
        for server in servers[first:] + servers[:first]:
            name = server.contestant.name
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            server.wake()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                results = runner.run(_turn(server, loads, num_tokens, f"round {number}"))
            server.rest()
            for load, result in results.items():
                runs[name][load].append(result)
    return runs


def _compare(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One precision: what ran, and what came of it. Raises ServerUnfit if a server does not start."""
    loads = _loads(args)
    with tempfile.TemporaryDirectory() as directory:
        servers = [ServerProcess(c, Path(directory)) for c in _contestants(args, loads, precision)]
        try:
            runs = _run_rounds(args, servers, loads)
        finally:
            for server in servers:
                server.stop()
    return {"commands": {s.contestant.name: s.contestant.shown for s in servers}, "rounds": runs}


def _print(title: str, runs: Runs, loads: dict[str, Load], ours: Sequence[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 240)
    for figure in FIGURES:
        rows = [name for name, load in loads.items() if load.output_len > 1 or figure.of_prompts]
        if rows:
            console.print(table(title, figure, runs, rows, ours))
    for server, by_load in runs.items():
        errors = {error for rounds in by_load.values() for result in rounds for error in result["errors"]}
        if errors:
            console.print(f"{server} failed: {', '.join(sorted(errors))}")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    args.rounds = args.rounds or (1 if args.quick else 3)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the servers would outlive it
    results: dict[str, dict[str, Any]] = {}
    failures = []
    for precision in args.precision:
        try:
            results[precision] = _compare(args, precision)
        except ServerUnfit as error:
            failures.append(f"{precision}: {error}")
            continue
        except KeyboardInterrupt:
            sys.exit("compare.py: stopped")
        if args.out:
            _write(args, results)
        _print(f"{args.model.name} {precision}", results[precision]["rounds"], _loads(args), args.ours)
    if failures:
        sys.exit("compare.py: " + "\n".join(failures))


def _write(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    configuration = {name: getattr(args, name) for name in ("precision", "threads", "rounds", "quick")}
    configuration["model"] = args.model.name
    written = {"configuration": configuration, "machine": report.machine(), "results": results}
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
