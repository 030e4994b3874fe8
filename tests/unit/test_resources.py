"""What a model takes on this machine, before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model
from pagewire_engine import resources
from pagewire_engine.options import EngineOptions
from pagewire_engine.resources import Space, read_model_config
from tiny_models import make_model


@pytest.mark.parametrize(
    ("options", "bytes_per_weight"),
    [
        ({"dtype": "bfloat16"}, 2), ({"dtype": "float32"}, 4), ({"dtype": "float16"}, 4),  # as it is computed here
        ({"dtype": "bfloat16", "quantization": "int8"}, 1.1), ({"dtype": "bfloat16", "quantization": "int4"}, 0.65),
    ],
    ids=str,
)  # fmt: skip
def test_weights_that_do_not_fit_as_they_are_loaded_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], bytes_per_weight: float
) -> None:
    """Not as they are stored: a quantized model fits where its files would not."""
    model = resolve_model(str(make_model(tmp_path, "llama")))
    asked = EngineOptions(device="cpu", **options)
    config, needed = read_model_config(model, asked), model.num_parameters * bytes_per_weight
    monkeypatch.setattr(resources, "available_memory", lambda: int(needed) + 1)
    Space(model, config, asked)
    monkeypatch.setattr(resources, "available_memory", lambda: int(needed) - 1)
    with pytest.raises(StartupError, match=r"the weights take [\d.]+ GiB"):
        Space(model, config, asked)


def test_a_pool_that_does_not_fit_is_refused_by_the_flag_that_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve_model(str(make_model(tmp_path, "llama")))
    asked = EngineOptions(device="cpu", kv_cache_memory_bytes=3 << 30)
    space = Space(model, read_model_config(model, asked), asked)
    monkeypatch.setattr(resources, "available_memory", lambda: 3 << 30)
    assert space.num_blocks() > 0
    monkeypatch.setattr(resources, "available_memory", lambda: 2 << 30)
    with pytest.raises(StartupError, match=r"--kv-cache-memory-bytes is 3.0 GiB and 2.0 GiB of memory are free"):
        space.num_blocks()
