"""Random checkpoints for benchmarks: ours loads them, and their GGUF names and rows are what llama.cpp expects."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from engines import Run, make_engine, run_all
from pagewire_bench import gguf_file
from pagewire_bench.random_model import from_bf16, to_bf16
from safetensors import safe_open
from tiny_models import write_tokenizer


@pytest.fixture(scope="module")
def make_model() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "make_model.py"
    spec = importlib.util.spec_from_file_location("benchmark_make_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the smallest checkpoint, with a tokenizer that need not be trained."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return ["--shape", "micro", "--tokenizer", str(directory / "tokenizer.json")]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_random_checkpoint_runs_and_its_output_varies(
    architecture: str, make_model: ModuleType, micro: list[str], tmp_path: Path
) -> None:
    """Uniform attention, what plain random weights have, would give one token for ever."""
    make_model.main([str(tmp_path), *micro, "--architecture", architecture, "--untie"])
    run = Run(list(range(64, 80)), ignore_eos=True)
    run_all(make_engine(tmp_path, dtype="float32"), run)
    assert len(run.tokens()) == 12 and len(set(run.tokens())) > 3


def test_the_same_arguments_make_the_same_weights(make_model: ModuleType, micro: list[str], tmp_path: Path) -> None:
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        make_model.main([str(tmp_path / name), *micro, "--seed", seed])
    first, again, other = (tmp_path / n / "model.safetensors" for n in ("first", "again", "other"))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -2.5], dtype=np.float32)
    assert from_bf16(to_bf16(values)).tolist() == [1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7, -2.5]


def test_gguf_names() -> None:
    assert gguf_file.gguf_name("model.layers.11.self_attn.q_proj.bias") == "blk.11.attn_q.bias"
    assert gguf_file.gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_file.gguf_name("lm_head.weight") == "output.weight"


def test_rotary_halves_become_pairs_within_each_head() -> None:
    rows = np.arange(8)[:, None]  # two heads of four rows
    assert gguf_file.interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_quantized_forms_hold_the_same_weights(make_model: ModuleType, micro: list[str], tmp_path: Path) -> None:
    make_model.main([str(tmp_path), *micro, "--shape", "tiny", "--compressed", "int8", "int4"])
    name = "model.layers.0.mlp.down_proj.weight"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        weight = file.get_tensor(name).float()
    with safe_open(tmp_path / "compressed-int8" / "model.safetensors", "pt") as file:
        int8 = file.get_tensor(name).float() * file.get_tensor(f"{name}_scale").float()
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    with safe_open(tmp_path / "compressed-int4" / "model.safetensors", "pt") as file:
        packed, scale = file.get_tensor(f"{name}_packed"), file.get_tensor(f"{name}_scale").float()
        assert file.get_tensor(f"{name}_shape").tolist() == list(weight.shape)
    nibbles = (packed[:, :, None] >> torch.arange(0, 32, 4)) & 15
    int4 = ((nibbles.flatten(1) - 8).view(*scale.shape, -1) * scale[:, :, None]).flatten(1)
    assert (int8 - weight).norm() / weight.norm() < 0.01
    assert (int4 - weight).norm() / weight.norm() < 0.12


def test_a_shape_without_whole_groups_has_no_int4_form(
    make_model: ModuleType, micro: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="groups of 32"):
        make_model.main([str(tmp_path), *micro, "--compressed", "int4"])


def test_an_unknown_gguf_type_is_refused(make_model: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        make_model.main([str(tmp_path), "--gguf", "q9_9"])
