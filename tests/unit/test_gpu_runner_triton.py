"""The whole GPU step in the kernels that a GPU runs, interpreted: arguments, layouts and dtypes fit the runner's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_step_script
import pytest
from tiny_models import make_model

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'pagewire[test]'"
)


def test_the_step_in_triton_kernels_chooses_what_it_chooses_in_plain_torch(tmp_path: Path) -> None:
    """One layer with head norms, float32: the interpreter multiplies bfloat16 wrongly."""
    model = make_model(tmp_path / "qwen3", "qwen3", intermediate_size=128, num_hidden_layers=1)
    environ = os.environ | {"TRITON_INTERPRET": "1", "PAGEWIRE_KERNELS": "triton", "PYTHONPATH": str(TESTS)}
    script = [sys.executable, str(TESTS / "gpu_step_script.py"), str(model)]
    run = subprocess.run(script, env=environ, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    for variant, interpreted in zip(gpu_step_script.VARIANTS, json.loads(run.stdout.splitlines()[-1]), strict=True):
        expected = gpu_step_script.play(model, variant)
        assert [token for token, _ in interpreted] == [token for token, _ in expected], variant
        nearly = pytest.approx([p for _, p in expected if p is not None], abs=0.1 if variant == "fp8" else 1e-3)
        assert [p for _, p in interpreted if p is not None] == nearly, variant
