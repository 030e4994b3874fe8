"""Disaggregated against the same two workers with both roles, on this machine, interleaved.

    python benchmarks/roles.py --rounds 3 --out benchmarks/results/roles.json

Every round starts each arrangement with `pagewire serve`, runs each load of LOADS on it with
`benchmarks/serve.py`, and stops it. Prints medians over the rounds, their spread, and the ratio of 1P1D
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

ROOT = Path(__file__).parents[1]
ARRANGEMENTS = {"1P1D": ["--prefill=1", "--decode=1"], "2 x both": ["--both=2"]}
LOADS = {
    "chat, 8 in flight": ["--concurrency=8", "--num-requests=80", "--prompt-len=64:256", "--output-len=64"],
    "long prompts, 4 in flight": ["--concurrency=4", "--num-requests=40", "--prompt-len=1200", "--output-len=64"],
    "shared prefix, 8 in flight": ["--concurrency=8", "--num-requests=80", "--prompt-len=512", "--output-len=32",
                                   "--shared-prefix-share=0.9"],
}  # fmt: skip
FIGURES = {
    "TTFT p50 (ms)": ("ttft_ms", "p50"),
    "TTFT p99 (ms)": ("ttft_ms", "p99"),
    "ITL p50 (ms)": ("itl_ms", "p50"),
    "ITL p99 (ms)": ("itl_ms", "p99"),
    "output tokens/s": ("output_tokens_per_s",),
    "cached share": ("cached_tokens_share",),
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


def _measure(base_url: str, load: list[str], directory: Path) -> dict[str, Any]:
    out = directory / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks/serve.py"), f"--base-url={base_url}", f"--out={out}", *load]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    measured: dict[str, Any] = json.loads(out.read_text())
    return measured


def _figure(measured: dict[str, Any], path: tuple[str, ...]) -> float:
    value: Any = measured["results"]
    for key in path:
        value = value[key]
    return float(value)


def _table(load: str, runs: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("", *ARRANGEMENTS, "ratio", title=load)
    for name, path in FIGURES.items():
        cells, medians = [], []
        for arrangement in ARRANGEMENTS:
            values = [_figure(run, path) for run in runs[arrangement]]
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:.2f} ({min(values):.2f}-{max(values):.2f})")
        table.add_row(name, *cells, f"{medians[0] / medians[1]:.2f}" if medians[1] else "-")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {load: {a: [] for a in ARRANGEMENTS} for load in LOADS}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(args.rounds):
            for arrangement, flags in ARRANGEMENTS.items():
                process, base_url = _served(flags, args, Path(name))
                for load, options in LOADS.items():
                    runs[load][arrangement].append(_measure(base_url, options, Path(name)))
                process.send_signal(signal.SIGINT)
                process.wait()
    for load in LOADS:
        Console().print(_table(load, runs[load]))
    if args.out:
        args.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
