"""Disaggregated against the same two workers with both roles, on this machine, interleaved.

    python benchmarks/roles.py --rounds 3 --out benchmarks/results/roles.json
    python benchmarks/make_model.py random/tiny16k --shape tiny --context 16384
    python benchmarks/roles.py --model random/tiny16k --loads "streams beside 8k prompts" --out ...

Every round starts each arrangement with `pagewire serve`, runs each load of LOADS on it with
`pagewire bench`, and stops it. Prints medians over the rounds, their spread, and the ratio of 1P1D
to two workers with both roles (below 1 is better for times, above 1 for tokens per second).
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ARRANGEMENTS = {"1P1D": ["--prefill=1", "--decode=1"], "2 x both": ["--both=2"]}


def _load(concurrency: int, prompt_len: int, output_len: int, *more: str) -> list[str]:
    lengths = [f"--random-input-len={prompt_len}", f"--random-output-len={output_len}"]
    return [f"--max-concurrency={concurrency}", *lengths, "--num-warmups=2", *more]


LOADS = {
    "chat, 8 in flight": _load(8, 160, 64, "--num-prompts=80", "--random-range-ratio=0.6"),
    "long prompts, 4 in flight": _load(4, 1200, 64, "--num-prompts=40"),
    "shared prefix, 8 in flight": _load(8, 51, 32, "--num-prompts=80", "--random-prefix-len=461"),
    "streams beside 8k prompts": _load(4, 64, 256, "--duration=40"),
}
# What a second client asks for at the same time; its figures are kept beside those of the load.
BESIDE = {
    "streams beside 8k prompts": _load(1, 8000, 1, "--duration=40", "--seed=1", "--num-warmups=0"),
}
DEFAULT_LOADS = [load for load in LOADS if load not in BESIDE]  # the demo model's context is too short for 8k
FIGURES = {
    "TTFT p50 (ms)": "median_ttft_ms",
    "TTFT p99 (ms)": "p99_ttft_ms",
    "ITL p50 (ms)": "median_itl_ms",
    "ITL p99 (ms)": "p99_itl_ms",
    "output tokens/s": "output_throughput",
    "cached share": "cached_tokens_share",
}


def _served(arrangement: list[str], args: argparse.Namespace, directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A running system and its base URL."""
    state = directory / "state.json"
    state.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("pagewire")), "serve", *([args.model] if args.model else [])]
    process = subprocess.Popen(
        [*command, *arrangement, f"--port={args.port}", f"--state-file={state}"], stdout=subprocess.DEVNULL
    )
    while not state.exists():
        if process.poll() is not None:
            sys.exit("roles.py: `pagewire serve` did not start; its own message is above")
        time.sleep(0.1)
    return process, json.loads(state.read_text())["base_url"]


def _measure(base_url: str, load: str, directory: Path) -> dict[str, Any]:
    out = {name: directory / f"{name}.json" for name in ("load", "beside")}
    program = str(Path(sys.executable).with_name("pagewire"))
    command = [program, "bench", f"--base-url={base_url}", "--save-result", "--result-filename"]
    beside = None
    if load in BESIDE:
        beside = subprocess.Popen(
            [*command, str(out["beside"]), *BESIDE[load]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    subprocess.run(
        [*command, str(out["load"]), *LOADS[load]],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    measured: dict[str, Any] = json.loads(out["load"].read_text())
    if beside is not None:
        if beside.wait():
            sys.exit("roles.py: the second client of the load failed")
        measured["beside"] = json.loads(out["beside"].read_text())
    return measured


def _table(load: str, runs: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("", *ARRANGEMENTS, "ratio", title=load)
    for name, key in FIGURES.items():
        cells, medians = [], []
        for arrangement in ARRANGEMENTS:
            values = [float(run[key]) for run in runs[arrangement]]
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:.2f} ({min(values):.2f}-{max(values):.2f})")
        table.add_row(name, *cells, f"{medians[0] / medians[1]:.2f}" if medians[1] else "-")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=DEFAULT_LOADS, metavar="NAME")
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {load: {a: [] for a in ARRANGEMENTS} for load in args.loads}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(args.rounds):
            for arrangement, flags in ARRANGEMENTS.items():
                process, base_url = _served(flags, args, Path(name))
                for load in args.loads:
                    runs[load][arrangement].append(_measure(base_url, load, Path(name)))
                process.send_signal(signal.SIGINT)
                process.wait()
    for load in args.loads:
        Console().print(_table(load, runs[load]))
    if args.out:
        args.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
