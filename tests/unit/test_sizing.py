"""`pagewire sizing`: its formulas against known cases, against the simulator, and as a command."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import random
from pathlib import Path

import pytest
import sizing as benchmark
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import worker_pb2
from pagewire_cli.capacity import Machine, Sizing, Targets, Traffic
from pagewire_cli.main import main
from pagewire_cli.sizing import add_subcommand, report
from pagewire_core.command_line import Parser
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.load import StepModel
from router_scene import scene, until

MODEL = StepModel(10.0, 0.1, 1e-5, 15.0, 0.2, 1e-4)
COSTS = (
    "prefill-base-ms: 10\nprefill-ms-per-token: 0.1\nprefill-ms-per-attended: 1e-5\n"
    "decode-base-ms: 15\ndecode-ms-per-sequence: 0.2\ndecode-ms-per-kv-token: 1e-4\n"
)


def _sizing(rate: float = 10.0, prompt: int = 1000, output: int = 100, **more: float) -> Sizing:
    return Sizing(Traffic(rate, prompt, output, **more), Targets(1000.0, 50.0), Machine(MODEL))


def test_a_prompt_costs_what_the_router_says_and_the_cache_spares() -> None:
    assert _sizing().prompt_ms == MODEL.prefill_ms(1000)
    assert _sizing(hit=0.8).prompt_ms == MODEL.prefill_ms(200, 800)
    assert _sizing(hit=1.0).prompt_ms == MODEL.prefill_ms(1, 999), "the last token is always computed"


def test_one_prefill_worker_is_an_m_g_1_queue() -> None:
    """Pollaczek and Khinchine know the mean and the variance exactly; lengths are exponential here."""
    for percentile, times in ((90.0, math.log(10)), (99.0, math.log(100))):
        sizing = dataclasses.replace(_sizing(rate=4.0, variation=1.0), targets=Targets(1e9, 1e9, percentile))
        service, busy = sizing.prompt_ms, 4.0 * sizing.prompt_ms / 1000
        # Of M/M/1 the whole time is exponential.
        assert sizing.prefill(1).ttft_ms == pytest.approx(times * service / (1 - busy), rel=0.02)


def test_decoding_sequences_are_those_of_little_s_law() -> None:
    sizing = _sizing(rate=20.0, output=200)
    estimate = sizing.decode(2)
    step = MODEL.decode_base_ms + sizing.sequence_ms * (1 + estimate.sequences)
    assert estimate.sequences == pytest.approx(20.0 / 2 * 199 * step / 1000)
    assert estimate.gap_ms == pytest.approx(step) and estimate.itl_ms > step


@given(
    st.floats(0.1, 300), st.integers(1, 8000), st.integers(1, 2000), st.floats(0, 1), st.floats(0, 2), st.integers(0, 3)
)
def test_the_fewest_workers_keep_the_targets_and_one_less_does_not(
    rate: float, prompt: int, output: int, hit: float, variation: float, kind: int
) -> None:
    machine = Machine(MODEL, kv_tokens=100_000, max_num_seqs=64, kv_bytes_per_token=1000, bytes_per_s=1e9)
    sizing = Sizing(Traffic(rate, prompt, output, hit, variation), Targets(2000.0, 60.0), machine)
    kinds = [(sizing.prefill, {"itl": False}), (sizing.decode, {"ttft": False}), (sizing.both, {})]
    estimate, which = kinds[kind % 3]
    fewest = sizing.fewest(estimate, **which)
    if fewest is None:
        assert not sizing.keeps(estimate(100_000), **which)
        return
    assert sizing.keeps(fewest, **which) and fewest.busy < 1
    assert fewest.workers == 1 or not sizing.keeps(estimate(fewest.workers - 1), **which)
    more = Sizing(dataclasses.replace(sizing.traffic, rate=rate * 1.5), sizing.targets, machine)
    again = more.fewest({0: more.prefill, 1: more.decode, 2: more.both}[kind % 3], **which)
    assert again is None or again.workers >= fewest.workers


def test_a_simulated_fleet_of_that_size_does_what_was_said() -> None:
    """And one prefill worker less does not. `benchmarks/sizing.py` has more traffics."""
    traffic = benchmark.TRAFFICS["chat"]
    sizing = Sizing(traffic, benchmark.TARGETS, benchmark.MACHINE)
    prefill, decode = sizing.fewest(sizing.prefill, itl=False), sizing.fewest(sizing.decode, ttft=False)
    assert prefill is not None and decode is not None and (prefill.workers, decode.workers) == (3, 3)
    came = benchmark.simulated(traffic, 3, 3, 15.0, seed=1)
    assert came["ttft_ms"] <= benchmark.TARGETS.ttft_ms and came["itl_ms"] <= benchmark.TARGETS.itl_ms
    assert 0.7 < decode.itl_ms / came["itl_ms"] < 1.4 and 0.6 < prefill.ttft_ms / came["ttft_ms"] < 2.5
    assert benchmark.simulated(traffic, 2, 3, 15.0, seed=1)["ttft_ms"] > benchmark.TARGETS.ttft_ms


def test_the_simulated_lengths_are_those_of_the_traffic() -> None:
    traffic = Traffic(100.0, 400, 10, variation=0.5)
    lengths = [len(arrival.prompt) for _, arrival in benchmark.trace(traffic, random.Random(0), 8.0)]
    mean = sum(lengths) / len(lengths)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    assert mean == pytest.approx(400, rel=0.06) and deviation / mean == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("rate", "prompt", "output", "verdict"),
    [
        (1.0, 100, 50, "Disaggregation does not pay in workers: 1 that do both"),
        (40.0, 2000, 100, "Disaggregation pays: "),
        (1.0, 20000, 100, "A prompt alone takes "),
    ],
)
def test_it_says_whether_two_kinds_of_workers_pay(rate: float, prompt: int, output: int, verdict: str) -> None:
    lines = list(report(_sizing(rate, prompt, output)))
    assert [line for line in lines if line.startswith(verdict)], lines
    assert all(f"{title}" in "\n".join(lines) for title in ("prefill workers:", "decode workers:", "that do both:"))


def test_a_target_that_leaves_nothing_to_wait_is_pointed_out() -> None:
    """The number of workers then hangs on the last millisecond."""
    sizing = dataclasses.replace(_sizing(2.0, 1000, 100), targets=Targets(_sizing().prompt_ms * 1.75, 1000.0))
    lines = list(report(sizing))
    assert [line for line in lines if line.startswith("  --ttft ") and "with nothing to wait for, p90 is" in line]
    assert not [line for line in report(_sizing(2.0, 1000, 100)) if "nothing to wait" in line]


def test_costs_may_come_from_a_file_and_must_come_from_somewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic = ["--request-rate=20", "--prompt-tokens=1000", "--output-tokens=100"]
    path = tmp_path / "costs.yaml"
    path.write_text(COSTS + "kv-bytes-per-token: 160000\n")
    main(["sizing", f"--config={path}", "--bandwidth=0.5", *traffic])
    out = capsys.readouterr().out
    assert "20 requests/s x 115.0 ms keep 2.30 workers busy" in out and "prefill workers: 3\n" in out
    assert "160.0 MB, 320.0 ms at 0.5 GB/s: it delays the second token by 239.5 ms" in out
    for arguments, message in ((traffic, "give --router, or --prefill-base-ms"), (traffic[1:], "--request-rate")):
        with pytest.raises(SystemExit):
            main(["sizing", *arguments])
        assert message in capsys.readouterr().err


async def test_costs_may_be_those_that_the_workers_of_a_router_have_measured(
    byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(environ={})
    add_subcommand(parser.add_subparsers())

    def run(address: str) -> str:
        flags = ["--request-rate=20", "--prompt-tokens=1000", "--output-tokens=100", f"--router={address}"]
        args: argparse.Namespace = parser.parse_args(["sizing", *flags])
        args.run(args)
        return capsys.readouterr().out

    async with scene(byte_tokenizer, "p1 d1") as s:
        with pytest.raises(Exception, match="no worker has measured steps of prompts yet"):
            await asyncio.to_thread(run, s.address)
        s.workers["p1"].step_cost = worker_pb2.StepCost(
            prefill_base_ms=10, prefill_ms_per_token=0.1, prefill_ms_per_attended=1e-5, decode_base_ms=99
        )
        s.workers["d1"].step_cost = worker_pb2.StepCost(
            prefill_base_ms=99, decode_base_ms=15, decode_ms_per_sequence=0.2, decode_ms_per_kv_token=1e-4
        )
        model = {worker.worker_id: worker for worker in s.router.services.workers.live}
        await until(lambda: all(worker.stats.step_cost.decode_base_ms for worker in model.values()))
        out = await asyncio.to_thread(run, s.address)
    assert "20 requests/s x 115.0 ms keep 2.30 workers busy" in out and "  decode-base-ms: 15\n" in out
