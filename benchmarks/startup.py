"""How long `pagewire serve` takes to its first answer, and what its workers take of memory then.

    python benchmarks/startup.py --rounds 5 --out benchmarks/results/startup.json

Side by side in each round: workers that are forked from a process that has imported everything (as they are) and such
as import for themselves; one prefill and one decode worker, or one with both roles. Times are also told in those of
`import torch` alone, which no worker can do without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from pagewire_cli.load.report import machine
from pagewire_cli.plan import WORKER_ROLES
from pagewire_cli.ports import free_ports
from rich.console import Console
from rich.table import Table

_ALONE = "from pagewire_cli import serve; serve.helps = lambda args: False; "
_MAIN = "from pagewire_cli.main import main; main()"
ARRANGEMENTS = {
    "1 + 1, forked": (_MAIN, ()),
    "1 + 1, each alone": (_ALONE + _MAIN, ()),
    "one, forked": (_MAIN, ("--both", "1")),
    "one, alone": (_ALONE + _MAIN, ("--both", "1")),
}
_POLL_S = 0.02
_BODY = {"prompt": "Once", "max_tokens": 1}


def started(code: str, flags: Sequence[str], model: str | None) -> dict[str, float]:
    """Seconds from the command to an answer, and MiB that the workers take then, what they share counted once."""
    [port] = free_ports(1)
    with tempfile.TemporaryDirectory() as directory:
        state = Path(directory) / "state.json"
        command = [sys.executable, "-P", "-c", code, "serve", *([model] if model else []), *flags]
        began = time.monotonic()
        process = subprocess.Popen([*command, f"--port={port}", f"--state-file={state}"], stdout=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                while not state.exists():
                    if process.poll() is not None:
                        sys.exit("startup.py: `pagewire serve` did not start; its own message is above")
                    time.sleep(_POLL_S)
                served = json.loads(state.read_text())
                client.post("/v1/completions", json=_BODY | {"model": served["model"]}).raise_for_status()
                seconds = time.monotonic() - began
            workers = [service["pid"] for service in served["services"] if service["role"] in WORKER_ROLES]
            memory = sum(psutil.Process(pid).memory_full_info().pss for pid in workers)
            return {"seconds": seconds, "workers_mib": memory / (1 << 20)}
        finally:
            process.terminate()
            process.wait()


def importing_torch() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-P", "-c", "import torch"], check=True)
    return time.monotonic() - began


def table(torch_s: Sequence[float], runs: dict[str, list[dict[str, float]]]) -> Table:
    view = Table("", "first answer (s)", "of `import torch`", "workers (MiB)")
    for name, rounds in runs.items():
        seconds = [r["seconds"] for r in rounds]
        ratios = [s / alone for s, alone in zip(seconds, torch_s, strict=True)]
        memory = statistics.median(r["workers_mib"] for r in rounds)
        view.add_row(name, _spread(seconds), _spread(ratios), f"{memory:.0f}")
    view.add_row("`import torch`", _spread(torch_s), "1", "")
    return view


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ARRANGEMENTS}
    torch_s: list[float] = []
    importing_torch()  # files come from the disk for the first time
    for _ in range(args.rounds):
        torch_s.append(importing_torch())
        for name, (code, flags) in ARRANGEMENTS.items():
            runs[name].append(started(code, flags, args.model))
    Console().print(table(torch_s, runs))
    if args.out:
        results: dict[str, Any] = {"machine": machine(), "import_torch_s": torch_s, "runs": runs}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
