"""The engine's benchmark: what it asks, the limits it compares with, and one small real run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from pagewire_bench import limits
from pagewire_bench.engine_cases import Case, make_cases
from pagewire_bench.limits import Limits
from pagewire_bench.needs import Needs, needs_of

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "pagewire-demo"
LIMITS = Limits(bytes_per_s=1e9, operations_per_s={"float32": 1e10, "bfloat16": 2e10, "int8": 4e10})
NEEDS = Needs(layer_weights=1_000_000, head_weights=500_000, num_layers=2, num_heads=4, head_dim=16)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_engine", ROOT / "benchmarks" / "engine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_weights_of_a_tied_model_are_counted_once() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    hidden, inter, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries, keys = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    needs = needs_of(DEMO)
    assert needs.layer_weights == layers * hidden * (2 * queries + 2 * keys + 3 * inter)
    assert needs.head_weights == config["vocab_size"] * hidden


def test_few_sequences_are_bound_by_bytes_and_many_by_arithmetic() -> None:
    assert NEEDS.decode_ms(LIMITS, "bfloat16", 1, kv_bytes=1e6) == pytest.approx(3.0 + 1.0)
    assert NEEDS.decode_ms(LIMITS, "bfloat16", 100, kv_bytes=1e6) == pytest.approx(2 * 100 * 1.5e6 / 2e10 * 1e3)
    assert NEEDS.decode_ms(LIMITS, "int8", 1, kv_bytes=0) == pytest.approx(1.5)
    assert NEEDS.decode_ms(LIMITS, "int4", 1, kv_bytes=0) == pytest.approx(0.5 + 0.5), "the output matrix stays int8"


def test_a_prompt_needs_its_matrix_products_and_half_of_a_square_of_attention() -> None:
    operations = 2 * (1000 * 1_000_000 + 500_000) + 4 * 2 * 4 * 16 * 1000 * 1001 // 2
    assert NEEDS.prefill_ms(LIMITS, "bfloat16", 1000) == pytest.approx(operations / 2e10 * 1e3)


def test_cases_that_do_not_fit_the_model_are_left_out() -> None:
    cases = make_cases([1, 8], [128, 1024], [512, 1024], [4], steps=8, longest=1024)
    assert [case.name for case in cases] == [
        "decode 1 x 128 tokens", "decode 8 x 128 tokens", "prefill 512 tokens", "4 streams",
    ]  # fmt: skip


def test_a_closed_loop_needs_its_prompts_and_its_steps() -> None:
    streams = Case("streams", 4, 128)
    steps = Case("decode", 4, 190, steps=0).least_ms(NEEDS, LIMITS, "bfloat16", 100)
    prompts = 4 * NEEDS.prefill_ms(LIMITS, "bfloat16", 128)
    assert streams.least_ms(NEEDS, LIMITS, "bfloat16", 100) == pytest.approx(2 * (prompts + 127 * steps))
    assert streams.num_tokens == 2 * 4 * 128


@pytest.mark.usefixtures("keep_threads")
def test_a_small_run_measures_every_case_of_every_method(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "_SIZE", 64)
    out = tmp_path / "out.json"
    sizes = [
        "--num-seqs",
        "2",
        "--contexts",
        "40",
        "--prompts",
        "40",
        "--streams",
        "1",
        "--steps",
        "2",
        "--rounds",
        "1",
    ]
    benchmark.main([str(DEMO), "--runner", "torch", "--threads", "1", *sizes, "--out", str(out)])
    measured = json.loads(out.read_text())
    assert measured["methods"]["torch"]["weights"] == "bfloat16"
    assert list(measured["results"]["torch"]) == ["decode 2 x 40 tokens", "prefill 40 tokens", "1 streams"]
    for case in measured["results"]["torch"].values():
        assert 0 < case["least_ms"] <= case["ms"] <= case["greatest_ms"]
        assert case["tokens_per_s"] > 0 and case["limit_ms"] > 0
    assert measured["limits"]["bytes_per_s"] > 1e8
    assert "decode 2 x 40 tokens" in capsys.readouterr().out


@pytest.mark.usefixtures("keep_threads")
def test_what_the_engine_refuses_is_one_sentence(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    with pytest.raises(SystemExit, match="no case fits the model's length"):
        benchmark.main([str(tmp_path), "--contexts", "128", "--prompts", "128"])
