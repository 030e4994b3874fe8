"""What dividing a worker among processes costs on one machine, where it cannot gain: all share the same cores.

    python benchmarks/parallel.py MODEL --threads 2 --out benchmarks/results/parallel.json

Every shape has the same number of threads in all. Prints, for a prompt and for a step of several streams, medians of
milliseconds over the rounds with the least and the greatest, and the ratio to one process, taken in each round; and
what each rank gives each other one in such a step, by decision 0012's formula.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from pagewire_cli.load import report
from pagewire_core.model_dir import resolve_model
from pagewire_engine.engine import Engine
from pagewire_engine.loader import load
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel.runner import ParallelRunner
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request
from rich.console import Console
from rich.table import Table

SHAPES = {"one": (1, 1), "tp 2": (2, 1), "pp 2": (1, 2), "tp 4": (4, 1)}
PROMPT, STREAMS, OUTPUT = 448, 8, 32


def _engine(args: argparse.Namespace, tp: int, pp: int) -> Engine:
    options = EngineOptions(
        dtype="bfloat16", device="cpu", tensor_parallel_size=tp, pipeline_parallel_size=pp, threads=args.threads,
        max_model_len=512, kv_cache_memory_bytes=1 << 30, max_prefill_delay_ms=0, enable_prefix_caching=False,
    )  # fmt: skip
    loaded = load(resolve_model(str(args.model)), options)
    return Engine(loaded.runner, loaded.config)


def _times(engine: Engine) -> dict[str, float]:
    """Milliseconds of a prompt, and of a step of streams: of all their tokens over those after the first."""
    first, whole = (_run(engine, 16, STREAMS, tokens) for tokens in (1, OUTPUT + 1))
    return {"prompt": _run(engine, PROMPT, 1, 1), "step": (whole - first) / OUTPUT}


def _run(engine: Engine, num_tokens: int, streams: int, output: int) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    prompt = [random.randrange(64, 1000) for _ in range(num_tokens)]
    engine.submit(Request("benchmark", prompt, bytes(32), params, streams, lambda event: None))
    started = time.perf_counter()
    while engine.step():
        pass
    return 1e3 * (time.perf_counter() - started)


def _kib_given(c: ModelConfig, ranks: int, rows: int) -> float:
    """What one rank sends each other rank in a step of so many rows, the head not counted."""
    row = (c.num_heads * c.head_dim + c.intermediate_size) * c.dtype.itemsize + 2 * c.hidden_size * 4
    return rows * c.num_layers * row / ranks / 1024 if ranks > 1 else 0.0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, float]]] = {}
    given: dict[str, float] = {}
    engines = {name: _engine(args, *shape) for name, shape in SHAPES.items() if name in args.shapes}
    for engine in engines.values():
        _times(engine)
    for _ in range(args.rounds):
        for name, engine in engines.items():
            rounds.setdefault(name, []).append(_times(engine))
    for name, engine in engines.items():
        given[name] = _kib_given(engine.runner.config, SHAPES[name][0], STREAMS)
        if isinstance(engine.runner, ParallelRunner):
            engine.runner.close()
    return {"machine": report.machine(), "threads": args.threads, "rounds": rounds, "kib_given_in_a_step": given}


def _print(found: dict[str, Any]) -> None:
    table = Table("shape", f"{PROMPT} tokens (ms)", "ratio", f"step of {STREAMS} (ms)", "ratio", "KiB to each rank")
    one = found["rounds"]["one"]
    for name, rounds in found["rounds"].items():
        cells = [name]
        for kind in ("prompt", "step"):
            times = [times[kind] for times in rounds]
            ratios = [mine[kind] / alone[kind] for mine, alone in zip(rounds, one, strict=True)]
            cells += [f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"]
            cells += [f"{statistics.median(ratios):.2f}"]
        table.add_row(*cells, f"{found['kib_given_in_a_step'][name]:.0f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["one", "tp 2", "pp 2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = _measure(args)
    _print(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
