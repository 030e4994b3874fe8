"""benchmarks/frontend.py: simulated workers keep their pace behind the real router and bridge; the figures add up."""

from __future__ import annotations

import argparse
from pathlib import Path

import frontend
import pytest
from pagewire_bench.frontends import FRONTENDS, installed, started
from pagewire_bench.paced import Pace
from pagewire_bench.stream_load import Load, held, run

PACE = Pace(ttft_s=0.02, itl_s=0.01)


@pytest.mark.parametrize("name", ["pagewire", "nothing"])
async def test_every_token_of_every_stream_arrives_and_none_before_its_time(name: str, tmp_path: Path) -> None:
    async with started(FRONTENDS[name](PACE, tmp_path, tmp_path), tmp_path) as (url, processes):
        measured = await run(url, Load(streams=4, tokens=8, seconds=1.0), PACE)
        assert not measured.errors and len(measured.ttft_s) >= 4
        assert measured.num_tokens == 8 * len(measured.ttft_s)
        assert min(measured.ttft_s) > PACE.ttft_s - 0.001  # timers of event loops count whole milliseconds
        assert len(processes) == (2 if name == "pagewire" else 0)
        async with held(url, 3):
            pass


def test_gateways_that_are_not_installed_are_left_out(tmp_path: Path) -> None:
    assert installed(None) == installed(tmp_path) == ["pagewire", "nothing"]
    (tmp_path / "lib/python3.11/site-packages/sglang_router").mkdir(parents=True)
    assert installed(tmp_path) == ["pagewire", "nothing", "sglang"]


def test_medians_are_over_the_rounds_of_one_front_end_and_one_load() -> None:
    figures = dict.fromkeys(frontend.FIGURES, 1.0) | {"streams": 4, "tokens": 16}
    runs = [
        {"frontend": "pagewire", "round": i, **figures, "tokens_per_cpu_s": rate}
        for i, rate in enumerate((3.0, 9.0, 4.0))
    ] + [{"frontend": "nothing", "round": 0, **figures, "tokens_per_cpu_s": None}]
    medians = frontend.result(runs, argparse.Namespace(streams=[4], tokens=[16], seconds=1.0))["medians"]
    assert medians["pagewire"]["4 x 16"]["tokens_per_cpu_s"] == 4.0
    assert "tokens_per_cpu_s" not in medians["nothing"]["4 x 16"]
    assert frontend.table(medians).row_count == 2
