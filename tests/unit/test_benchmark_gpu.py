"""benchmarks/gpu.py runs once, on a machine that is lent for minutes: here every part of it runs on a toy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu
import pytest


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("results") / "gpu.json"
    parts = [name for name in gpu.PARTS if name != "transformers"]
    gpu.main(["--tiny", "--device", "cpu", "--out", str(out), "--parts", *parts])
    loaded: dict[str, Any] = json.loads(out.read_text())
    return loaded


def test_no_part_fails(results: dict[str, Any]) -> None:
    assert '"error"' not in json.dumps({name: results[name] for name in gpu.PARTS if name in results})


def test_it_computes_what_transformers_computes(results: dict[str, Any]) -> None:
    agreement = results["agreement"]
    assert 0 <= agreement["mean"] <= agreement["max"] < 1e-3 and agreement["transformers_max"] < 1e-3
    assert agreement["compared"] == 8 * 20


def test_neither_graphs_nor_overlap_change_a_token(results: dict[str, Any]) -> None:
    assert all(results["exactness"].values()) and results["exactness"]["ids"] > 3


def test_every_load_is_timed_against_its_floor(results: dict[str, Any]) -> None:
    rows = [*results["load"]["rows"], *results["variants"]["int4"].values()]
    assert [row["num_seqs"] for row in rows] == [1, 2, 4, 1, 4]
    assert all(row["of_floor"] > 0 and row["decode_steps"] > 0 for row in rows)
    assert results["variants"]["fp8 kv"]["4"]["floor_ms"] < results["load"]["rows"][2]["floor_ms"]


def test_a_part_that_fails_loses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: gpu.Bench) -> gpu.Result:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "load", broken)
    out = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--device", "cpu", "--out", str(out), "--parts", "load", "prefill"])
    results = json.loads(out.read_text())
    assert results["load"]["error"] == "RuntimeError: no such kernel"
    assert len(results["prefill"]["rows"]) == 2
