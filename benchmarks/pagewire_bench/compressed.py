"""A checkpoint of ours with quantized weights, in the `compressed-tensors` form that vLLM reads.

int8: one scale a row, activations quantized for each token. int4: groups of 32, activations in bfloat16. As is usual
there, only the matrices inside the layers are quantized.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pagewire_bench.random_model import Tensors, from_bf16, to_bf16, write_safetensors, write_settings

KINDS = ("int8", "int4")
GROUP = 32  # of int4
_PER_WORD = 8  # int4 values in an int32


def directory_of(model: Path, kind: str) -> Path:
    """Where the quantized form of the checkpoint in `model` lies."""
    return model / f"compressed-{kind}"


def write_compressed(model: Path, kind: str, config: dict[str, Any], tensors: Tensors) -> None:
    """Writes directory_of(model, kind), with the tokenizer of `model`. `kind` is one of KINDS."""
    directory = directory_of(model, kind)
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    write_settings(directory, {**config, "quantization_config": _quantization(kind)})
    quantize = _int8 if kind == "int8" else _int4
    written: Tensors = {}
    for name, bits in tensors.items():
        if bits.ndim == 2 and ".layers." in name:
            written |= {f"{name}{suffix}": part for suffix, part in quantize(from_bf16(bits)).items()}
        else:
            written[name] = bits
    write_safetensors(directory / "model.safetensors", written)


def _int8(weight: np.ndarray) -> Tensors:
    scale = np.abs(weight).max(1, keepdims=True) / 127
    return {"": np.rint(weight / scale).astype(np.int8), "_scale": to_bf16(scale)}


def _int4(weight: np.ndarray) -> Tensors:
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // GROUP, GROUP)
    scale = np.abs(groups).max(2, keepdims=True) / 7
    nibbles = (np.rint(groups / scale) + 8).astype(np.uint32).reshape(rows, columns // _PER_WORD, _PER_WORD)
    packed = np.bitwise_or.reduce(nibbles << (4 * np.arange(_PER_WORD, dtype=np.uint32)), axis=2)
    shape = np.array([rows, columns], dtype=np.int64)
    return {"_packed": packed.view(np.int32), "_scale": to_bf16(scale[:, :, 0]), "_shape": shape}


def _quantization(kind: str) -> dict[str, Any]:
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
    activations = None
    if kind == "int8":
        weights |= {"num_bits": 8, "strategy": "channel"}
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
    }
