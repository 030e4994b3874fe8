"""How fast KV crosses between workers, and what that adds for a client.

    python benchmarks/make_model.py random/smol135
    python benchmarks/wire.py random/smol135 --rounds 3 --out benchmarks/results/wire.json

`lane` is what a lane itself moves in chunks of a size; `hand-off` is a whole transfer of a prompt from a KvSender to a
KvChannelServicer: gather from pages, checksum, lane, verification, scatter into pages, seal; over shared memory
every second one without checksums. In every round everything has its turn; the ratio to a TCP socket is taken in each.

With a model: the times to the first and second token of one prompt at a time with one prefill and one decode worker,
beside one worker of both roles, each with one thread; on this host, and with the workers in two network namespaces
with so many Gbit/s between them (needs root).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from pagewire_bench import netns, wire_lanes, wire_tokens
from pagewire_cli.load import report
from pagewire_transfer.lanes import available_lanes
from rich.console import Console
from rich.table import Table

REPEATS = {128: 5, 512: 3, 2048: 2, 8000: 1}
UNCHECKED = "shm, no checksum"

Rates = dict[str, dict[str, float]]
Tokens = dict[str, dict[int, list[wire_tokens.Figures]]]


def lanes_round(peer: wire_lanes.Peer, lanes: Sequence[str]) -> Rates:
    """Bytes a second, by what was moved and by how."""
    rates: Rates = defaultdict(dict)
    for size in wire_lanes.CHUNKS:
        row = rates[f"lane, chunks of {size >> 20} MB"]
        row["TCP socket"] = wire_lanes.measure_tcp(peer, size)
        row["memcpy"] = wire_lanes.measure_memcpy(size)
        for lane in lanes:
            if lane != "grpc":  # it moves its bytes in the control messages of a hand-off
                row[lane] = wire_lanes.measure_lane(peer, lane, size)
    for lane in lanes:
        tcp = wire_lanes.measure_tcp(peer, max(wire_lanes.CHUNKS))
        columns = {wire_lanes.CHECKED: lane} | ({wire_lanes.UNCHECKED: UNCHECKED} if lane == "shm" else {})
        for kind, by_tokens in wire_lanes.measure_hand_offs(peer, lane, list(columns)).items():
            for num_tokens, rate in by_tokens.items():
                row = rates[f"hand-off of {num_tokens} tokens"]
                row[columns[kind]] = rate
                row.setdefault("TCP socket", tcp)
    return rates


def tokens_round(model: Path, prompts: Sequence[int], networks: Sequence[float], console: Console) -> Tokens:
    repeats = {tokens: REPEATS.get(tokens, 2) for tokens in prompts}
    found: Tokens = {"both": wire_tokens.measure(model, repeats, pair=False)}
    for lane in available_lanes("auto", "cpu"):
        found[f"pair, {lane}"] = wire_tokens.measure(model, repeats, pair=True, lanes=lane)
    if networks and (why := netns.why_not()):
        console.print(f"No network namespaces: {why}. Links of a given rate are left out.")
        return found
    for gbit in networks:
        with netns.linked(gbit) as names:
            measured = wire_tokens.measure(model, repeats, pair=True, lanes="gloo", network=names)
            found[f"pair, gloo at {gbit:g} Gbit/s"] = measured
    return found


def lanes_table(rounds: Sequence[Rates], columns: Sequence[str]) -> Table:
    table = Table("GB/s (÷ TCP socket)", *columns, title="KV between two processes")
    for what in rounds[0]:
        cells = []
        for how in columns:
            if how not in rounds[0][what]:
                cells.append("-")
                continue
            rates = [r[what][how] / 1e9 for r in rounds]
            ratio = statistics.median(r[what][how] / r[what]["TCP socket"] for r in rounds)
            cells.append(f"{statistics.median(rates):.2f} ({min(rates):.2f}-{max(rates):.2f}) {ratio:.2f}x")
        table.add_row(what, *cells)
    return table


def checksums_cost(rounds: Sequence[Rates]) -> str:
    costs = []
    for what in rounds[0]:
        if UNCHECKED in rounds[0][what]:
            each = [100 * (r[what][UNCHECKED] / r[what]["shm"] - 1) for r in rounds]
            costs.append(f"{what} {statistics.median(each):.1f} % ({min(each):.1f}-{max(each):.1f})")
    return "Checksums cost: " + ", ".join(costs)


def tokens_table(rounds: Sequence[Tokens]) -> Table:
    """Medians over all rounds and repeats; what is added is so in each round."""
    table = Table("", "prompt", "first token (ms)", "added", "second token (ms)", "added", "tail (ms)",
                  "tail ÷ prefill", "overlap", title="One prompt at a time")  # fmt: skip
    for how in rounds[0]:
        for tokens in rounds[0][how]:

            def of(key: str, how: str = how, tokens: int = tokens) -> list[float]:
                return [statistics.median(f[key] for f in r[how][tokens]) for r in rounds]

            def added(key: str, of: Callable[..., list[float]] = of) -> str:
                return f"{statistics.median(a - b for a, b in zip(of(key), of(key, 'both'), strict=True)):.1f}"

            tail = statistics.median(t / p for t, p in zip(of("tail_ms"), of("prefill_ms"), strict=True))
            moved = [f"{statistics.median(of('tail_ms')):.1f}", f"{100 * tail:.1f} %",
                     f"{statistics.median(of('overlap')):.2f}"]  # fmt: skip
            table.add_row(
                how, str(tokens), f"{statistics.median(of('first_ms')):.1f}", added("first_ms"),
                f"{statistics.median(of('second_ms')):.1f}", added("second_ms"),
                *(["-"] * 3 if how == "both" else moved),
            )  # fmt: skip
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="without it only lanes and hand-offs are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[*REPEATS], metavar="TOKENS")
    parser.add_argument("--gbit", type=float, nargs="*", default=[1.0, 10.0, 25.0], help="links between the workers")
    parser.add_argument("--no-lanes", action="store_true", help="only what a client sees")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write the results there as JSON")
    args = parser.parse_args(argv)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(open("/dev/null", "w")))
    torch.set_num_threads(1)
    console, results = Console(width=180), dict[str, Any](machine=report.machine())
    if not args.no_lanes:
        lanes, peer = available_lanes("auto", "cpu"), wire_lanes.Peer()
        results["bytes_per_s"] = [lanes_round(peer, lanes) for _ in range(args.rounds)]
        peer.end()
        console.print(lanes_table(results["bytes_per_s"], ["TCP socket", "memcpy", *lanes, UNCHECKED]))
        if "shm" in lanes:
            console.print(checksums_cost(results["bytes_per_s"]))
    if args.model:
        results["tokens"] = [
            tokens_round(args.model.absolute(), args.prompts, args.gbit, console) for _ in range(args.rounds)
        ]
        console.print(tokens_table(results["tokens"]))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
