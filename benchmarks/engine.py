"""The engine alone, without HTTP: decode steps and prompts, against what this machine's memory and cores could do.

    python benchmarks/engine.py MODEL --quantization none int8 int4 --rounds 5 --out result.json

Every method has a process of its own; rounds are interleaved, and the limits (memory reads, matrix products) are
measured in each round too. Shows the 25th percentile over all rounds, their spread, and limit / measured: 1 is perfect.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from pagewire_bench.engine_cases import Case, make_cases
from pagewire_bench.engine_process import EngineProcess, EngineSetting, Method, Ready
from pagewire_bench.limits import LimitMeter, Limits
from pagewire_bench.needs import Needs, needs_of
from pagewire_cli.load import report
from pagewire_core.errors import StartupError
from rich.console import Console
from rich.table import Table

_RUNNERS = ("auto", "torch")
Times = dict[str, dict[str, list[list[float]]]]  # ms: by method, by case, by round


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory with a checkpoint")
    parser.add_argument(
        "--runner",
        nargs="+",
        choices=_RUNNERS,
        default=list(_RUNNERS),
        help="auto: the loader's choice; torch: the fallback",
    )
    parser.add_argument("--quantization", nargs="+", choices=("none", "int8", "int4"), default=["none"])
    parser.add_argument("--dtype", default="bfloat16", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--num-seqs", nargs="*", type=int, default=[1, 8, 32, 64], help="sequences that decode together"
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1024], help="tokens before the decode steps")
    parser.add_argument("--prompts", nargs="*", type=int, default=[128, 512, 2048], help="tokens of prompts")
    parser.add_argument("--streams", nargs="*", type=int, default=[32], help="requests in flight, as under compare.py")
    parser.add_argument("--steps", type=int, default=24, help="decode steps in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the results there as JSON")
    return parser


def _cases(args: argparse.Namespace) -> list[Case]:
    longest = json.loads((args.model / "config.json").read_text()).get("max_position_embeddings", 2048)
    return make_cases(args.num_seqs, args.contexts, args.prompts, args.streams, args.steps, longest)


def _methods(args: argparse.Namespace) -> list[Method]:
    """The fallback has no quantized weights."""
    kinds = [None if name == "none" else name for name in args.quantization]
    return [Method(runner, kind) for runner in args.runner for kind in kinds if runner == "auto" or kind is None]


def _run_rounds(engines: dict[str, EngineProcess], cases: Sequence[Case], num_rounds: int) -> tuple[Times, Limits]:
    """Round 0 is not counted: the first of everything is slow."""
    times: Times = {name: {case.name: [] for case in cases} for name in engines}
    meter = LimitMeter()
    for number in range(num_rounds + 1):
        print(f"round {number} of {num_rounds}" if number else "warm-up", file=sys.stderr, flush=True)
        limits = meter.measure()
        for case in cases:
            for name, engine in engines.items():
                measured = engine.run(case)
                if number:
                    times[name][case.name].append(measured)
    return times, limits


def _summary(rounds: list[list[float]], case: Case, ready: Ready, needs: Needs, limits: Limits) -> dict[str, float]:
    """ms: 25th percentile of all; least and greatest: of the rounds' own."""
    by_round = [_quarter(values) for values in rounds]
    ms = _quarter([value for values in rounds for value in values])
    limit_ms = case.least_ms(needs, limits, ready.weights, ready.kv_bytes_per_token)
    return {
        "ms": ms, "least_ms": min(by_round), "greatest_ms": max(by_round), "tokens_per_s": 1e3 * case.num_tokens / ms,
        "limit_ms": limit_ms, "share_of_limit": limit_ms / ms,
    }  # fmt: skip


def _quarter(values: Sequence[float]) -> float:
    return quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]


def _print(
    summaries: dict[str, dict[str, dict[str, float]]], engines: dict[str, EngineProcess], limits: Limits
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    rates = ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in limits.operations_per_s.items())
    console.print(f"limits: memory {limits.bytes_per_s / 1e9:.1f} GB/s; matrix products {rates}", highlight=False)
    table = Table()
    for column in ("", "case", "ms p25 (rounds)", "tokens/s", "limit ms", "limit / measured"):
        table.add_column(column, justify="left" if column in ("", "case") else "right")
    for method, cases in summaries.items():
        ready = engines[method].ready
        for case, s in cases.items():
            ms = f"{s['ms']:.2f} ({s['least_ms']:.2f}-{s['greatest_ms']:.2f})"
            rest = f"{s['tokens_per_s']:.0f}", f"{s['limit_ms']:.2f}", f"{s['share_of_limit']:.2f}"
            table.add_row(f"{ready.runner} {ready.weights}", case, ms, *rest)
        table.add_section()
    console.print(table)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints. Raises StartupError."""
    torch.set_num_threads(args.threads)
    cases = _cases(args)
    if not cases:
        raise StartupError("no case fits the model's length; give shorter --contexts or --prompts")
    setting, needs = EngineSetting(args.model, args.dtype, args.threads, tuple(cases)), needs_of(args.model)
    engines = {method.name: EngineProcess(setting, method) for method in _methods(args)}
    times, limits = _run_rounds(engines, cases, args.rounds)
    summaries = {
        name: {case.name: _summary(times[name][case.name], case, engine.ready, needs, limits) for case in cases}
        for name, engine in engines.items()
    }
    _print(summaries, engines, limits)
    for engine in engines.values():
        engine.close()
    return {
        "configuration": {**vars(args), "model": args.model.name, "out": None},
        "machine": report.machine(),
        "limits": asdict(limits),
        "methods": {name: asdict(engine.ready) for name, engine in engines.items()},
        "results": summaries,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    try:
        measured = run(args)
    except StartupError as error:
        sys.exit(f"engine.py: {error}")
    if args.out:
        args.out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
