"""The router's placement against hundreds of simulated workers, on a virtual clock: goodput of every routing policy.

    python benchmarks/simulate.py --out benchmarks/results/simulator.json

Every policy serves the same arrivals on the same workers. What is real: the placement with its index, bookings, links
and ties, the policies, and how workers learn their step costs. Workers, network and clients are simulated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagewire_bench.simulator import traces
from pagewire_bench.simulator.fleet import Fleet, FleetConfig
from pagewire_bench.simulator.score import ITL_S, TTFT_S, score
from pagewire_bench.simulator.worker import Hardware
from pagewire_router.load import StepModel
from pagewire_router.policies import POLICIES
from rich.console import Console
from rich.table import Table

# Steps of one GPU with a model of some tens of billions of parameters; milliseconds.
MODEL = StepModel(12.0, 0.2, 8e-6, 16.0, 0.12, 1.2e-4)
HARDWARE = Hardware(kv_tokens=200_000, max_num_seqs=128, kv_bytes_per_token=160_000)
# Trace -> requests per second that 100 workers are offered, prefill workers among them.
TRACES: dict[str, tuple[Any, float, int]] = {
    "chat": (traces.chat, 200.0, 12),
    "documents": (traces.documents, 190.0, 40),
    "bursts": (traces.bursts, 200.0, 45),
    "long among short": (traces.long_among_short, 230.0, 50),
    "mixed": (traces.mixed, 260.0, 40),
    "mixed, unequal workers": (traces.mixed, 220.0, 40),
}
UNEQUAL = {"speeds": (1.0, 1.0, 1.0, 1.7), "bandwidths": (25e9, 10e9, 3e9)}


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    jobs = [(trace, policy, seed, args) for trace in args.traces for policy in args.policies for seed in args.seeds]
    random.Random(0).shuffle(jobs)  # an early look tells something of everything
    runs: list[dict[str, Any]] = []
    with multiprocessing.Pool(args.processes) as pool:
        for run in pool.imap_unordered(_run, jobs):
            runs.append(run)
            shares = f"{run['attained']:.1%} (TTFT {run['ttft_attained']:.1%}, ITL {run['itl_attained']:.1%}"
            print(f"{run['trace']:24}{run['policy']:14}seed {run['seed']}: {shares}, local {run['local']:.0%}) "
                  f"in {run['wall_s']:.0f} s", flush=True)  # fmt: skip
            if args.out:
                args.out.write_text(json.dumps(_result(runs, args), indent=1) + "\n")
    Console(width=140).print(table(_result(runs, args)))


def _result(runs: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "workers": args.workers,
        "seconds": args.seconds,
        "load": args.load,
        "seeds": args.seeds,
        "targets": {"ttft_s": TTFT_S, "itl_s": ITL_S},
        "runs": sorted(runs, key=lambda r: (list(TRACES).index(r["trace"]), r["policy"], r["seed"])),
    }


def _run(job: tuple[str, str, int, argparse.Namespace]) -> dict[str, Any]:
    name, policy, seed, args = job
    began = time.perf_counter()
    trace, rate, num_prefill = TRACES[name]
    scale = args.workers / 100
    unequal: dict[str, Any] = UNEQUAL if "unequal" in name else {}
    prefill = round(num_prefill * scale)
    config = FleetConfig(prefill, args.workers - prefill, MODEL, HARDWARE, **unequal)
    rng = random.Random(f"{name.split(',')[0]}{seed}")
    arrivals = Fleet(config, POLICIES[policy], seed).run(
        trace(rng, rate * scale * args.load, args.seconds), args.seconds
    )
    facts = score(arrivals, args.seconds, MODEL).as_dict()
    return {"trace": name, "policy": policy, "seed": seed, "requests": len(arrivals), **facts,
            "wall_s": round(time.perf_counter() - began, 1)}  # fmt: skip


def table(result: dict[str, Any]) -> Table:
    """Mean goodput over the seeds, and the share that met both targets."""
    policies = list(dict.fromkeys(run["policy"] for run in result["runs"]))
    policies.sort(key=list(POLICIES).index)
    view = Table(
        title=f"Goodput: requests/s with TTFT <= {TTFT_S:g} s and mean ITL <= {ITL_S * 1000:g} ms (share of all)"
    )
    view.add_column("trace")
    for policy in policies:
        view.add_column(policy, justify="right")
    for trace in dict.fromkeys(run["trace"] for run in result["runs"]):
        cells = []
        for policy in policies:
            runs = [run for run in result["runs"] if (run["trace"], run["policy"]) == (trace, policy)]
            goodput, share = (statistics.fmean(run[key] for run in runs) for key in ("goodput", "attained"))
            cells.append(f"{goodput:.1f} ({share:.1%})")
        view.add_row(trace, *cells)
    return view


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=200, help="prefill and decode workers together")
    parser.add_argument("--seconds", type=float, default=40.0, help="of virtual time")
    parser.add_argument("--load", type=float, default=1.0, help="times the usual rate of requests")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
