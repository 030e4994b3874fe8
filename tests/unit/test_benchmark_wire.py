"""benchmarks/wire.py on little: every lane is measured, and tables say what was."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import wire
from pagewire_bench import netns, wire_lanes, wire_tokens
from pagewire_transfer.lanes import available_lanes
from rich.console import Console


def test_every_lane_is_measured_beside_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_lanes, "TOTAL_BYTES", 16 << 20)
    monkeypatch.setattr(wire_lanes, "PROMPTS", (512,))  # the peer, a process of its own, has larger ones
    lanes = available_lanes("auto", "cpu")
    peer = wire_lanes.Peer()
    try:
        rates = wire.lanes_round(peer, lanes)
    finally:
        peer.end()
    assert rates["hand-off of 512 tokens"].keys() == {"TCP socket", *lanes, wire.UNCHECKED}
    assert rates["lane, chunks of 4 MB"].keys() == {"TCP socket", "memcpy", *lanes} - {"grpc"}
    assert all(rate > 0 for row in rates.values() for rate in row.values())
    out = io.StringIO()
    Console(file=out, width=200).print(wire.lanes_table([rates], ["TCP socket", *lanes]))
    assert "1.00x" in out.getvalue() and "hand-off of 512" in out.getvalue()


def figures(first: float, second: float, tail: float) -> wire_tokens.Figures:
    return {"first_ms": first, "second_ms": second, "prefill_ms": 100.0, "tail_ms": tail, "overlap": 0.8}


def test_what_is_added_is_so_in_each_round() -> None:
    rounds = [
        {"both": {128: [figures(100, 110, 0)]}, "pair, shm": {128: [figures(103, 117, 4), figures(105, 119, 6)]}},
        {"both": {128: [figures(300, 310, 0)]}, "pair, shm": {128: [figures(304, 318, 5)]}},
    ]
    out = io.StringIO()
    Console(file=out, width=200).print(wire.tokens_table(rounds))
    row = next(line for line in out.getvalue().splitlines() if "pair, shm" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "pair, shm", "128", "204.0", "4.0", "218.0", "8.0", "5.0", "5.0 %", "0.80",
    ]  # fmt: skip


def test_without_root_networks_are_left_out_and_it_is_said_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wire_tokens, "measure", lambda *args, **options: {})
    monkeypatch.setattr(netns.os, "geteuid", lambda: 1000)
    out = io.StringIO()
    found = wire.tokens_round(tmp_path, [128], [1.0], Console(file=out))
    assert "not root" in out.getvalue() and not any("Gbit" in how for how in found)
