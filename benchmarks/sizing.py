"""What `pagewire sizing` says of fleets, against the router's own placement on simulated workers.

    python benchmarks/sizing.py --out benchmarks/results/sizing.json

For every traffic: the fleets that the command shows around its answer, each run in the simulator (`simulate.py`), and
the ratio of what was predicted to what came out. Above 1: the command is careful; below 1: it promises too much.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pagewire_bench.simulator.fleet import Fleet, FleetConfig
from pagewire_bench.simulator.traces import Arrival, Trace
from pagewire_cli.capacity import Machine, Sizing, Targets, Traffic
from pagewire_router.policies import POLICIES
from rich.console import Console
from rich.table import Table
from simulate import HARDWARE, MODEL

BANDWIDTH = 10e9
MACHINE = Machine(MODEL, HARDWARE.kv_tokens, HARDWARE.max_num_seqs, HARDWARE.kv_bytes_per_token, BANDWIDTH)
TARGETS = Targets(ttft_ms=2000.0, itl_ms=50.0)
TRAFFICS = {
    "chat": Traffic(40.0, 300, 200),
    "long answers": Traffic(25.0, 300, 400),
    "long prompts": Traffic(15.0, 3000, 150),
    "retrieval": Traffic(30.0, 1500, 60, variation=0.3),
}
_WARM = 0.3  # of the run, that counts for nothing


def trace(traffic: Traffic, rng: random.Random, seconds: float) -> Trace:
    """Poisson arrivals of prompts that share nothing, with lognormal lengths of the traffic's variation."""
    sigma = math.sqrt(math.log(1 + traffic.variation**2))
    now = 0.0
    while (now := now + rng.expovariate(traffic.rate)) < seconds:
        length = traffic.prompt_tokens * rng.lognormvariate(-(sigma**2) / 2, sigma)
        yield now, Arrival([rng.getrandbits(31) for _ in range(max(1, round(length)))], traffic.output_tokens)


def simulated(traffic: Traffic, prefill: int, decode: int, seconds: float, seed: int) -> dict[str, float]:
    """Milliseconds at the targets' percentile, of requests after the warm-up; infinite if too many never ended."""
    fleet = Fleet(FleetConfig(prefill, decode, MODEL, HARDWARE, bandwidths=(BANDWIDTH,)), POLICIES["pagewire"], seed)
    arrivals = fleet.run(trace(traffic, random.Random(seed), seconds), seconds)
    counted = [a for a in arrivals if _WARM * seconds <= a.at]
    ttft = [math.inf if a.first_token is None else 1000 * (a.first_token - a.at) for a in counted]
    itl = [
        math.inf
        if a.finished is None or a.first_token is None
        else 1000 * (a.finished - a.first_token) / (a.output_tokens - 1)
        for a in counted
    ]
    return {
        "ttft_ms": _quantile(ttft),
        "itl_ms": _quantile(itl),
        "local": statistics.fmean(a.plan == "local" for a in counted),
    }


def _quantile(values: Sequence[float]) -> float:
    return sorted(values)[int(TARGETS.percentile / 100 * (len(values) - 1))]


def compared(traffic: Traffic, seconds: float, seed: int) -> list[dict[str, Any]]:
    """The answer for two kinds of workers and for one kind, each with a worker less and a worker more."""
    sizing = Sizing(traffic, TARGETS, MACHINE)
    prefill, decode = sizing.fewest(sizing.prefill, itl=False), sizing.fewest(sizing.decode, ttft=False)
    both = sizing.fewest(sizing.both)
    assert prefill is not None and decode is not None and both is not None
    fleets = [(prefill.workers + n, decode.workers) for n in (-1, 0, 1)] + [(prefill.workers, decode.workers + 1)]
    fleets += [(0, both.workers + n) for n in (-1, 0, 1)]
    rows = []
    for p, d in fleets:
        if p < 0 or d < 1 or (p == 0 and d < both.workers - 1):
            continue
        whole = sizing.both(d)
        predicted = {
            "ttft_ms": _finite(sizing.prefill(p).ttft_ms if p else whole.ttft_ms),
            "itl_ms": _finite(sizing.decode(d).itl_ms if p else whole.itl_ms),
        }
        chosen = (p, d) in ((prefill.workers, decode.workers), (0, both.workers))
        rows.append(
            {"prefill": p, "decode": d, "chosen": chosen, "predicted": predicted,
             "simulated": simulated(traffic, p, d, seconds, seed)}
        )  # fmt: skip
    return rows


def _finite(value: float) -> float | None:
    """None: it cannot keep up."""
    return round(value, 1) if math.isfinite(value) else None


def _said(value: float | None) -> str:
    return "too few" if value is None else f"{value:.0f}"


def table(results: dict[str, list[dict[str, Any]]]) -> Table:
    view = Table(
        "traffic", "workers", *(f"{what} p90 ms" for what in ("TTFT", "ITL")), "predicted / simulated", "local"
    )
    for name, rows in results.items():
        for row in rows:
            said, came = row["predicted"], row["simulated"]
            workers = f"{row['prefill']} + {row['decode']}" if row["prefill"] else f"{row['decode']} both"
            cells = [f"{_said(said[key])} : {came[key]:.0f}" for key in ("ttft_ms", "itl_ms")]
            ratios = ", ".join(f"{said[key] / came[key]:.2f}" if said[key] else "-" for key in ("ttft_ms", "itl_ms"))
            view.add_row(name, f"{workers}{' *' if row['chosen'] else ''}", *cells, ratios, f"{came['local']:.0%}")
    return view


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of virtual time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--traffics", nargs="+", choices=list(TRAFFICS), default=list(TRAFFICS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    results = {name: compared(TRAFFICS[name], args.seconds, args.seed) for name in args.traffics}
    Console(width=120).print(table(results))
    if args.out:
        args.out.write_text(
            json.dumps({"seconds": args.seconds, "seed": args.seed, "traffics": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
