"""The bytes and operations that a model cannot do without, from its config.json and the names of its weights."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagewire_bench.limits import Limits

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Needs:
    """A dense decoder. The input embedding, of which a step reads a few rows, counts only as a tied output matrix."""

    layer_weights: int  # elements of all matrices inside layers
    head_weights: int
    num_layers: int
    num_heads: int
    head_dim: int

    def weight_bytes(self, kind: str) -> float:
        """Scales of quantized weights are not counted; with int4 weights the output matrix is int8."""
        head = "int8" if kind == "int4" else kind
        return self.layer_weights * _BYTES[kind] + self.head_weights * _BYTES[head]

    def decode_ms(self, limits: Limits, kind: str, num_seqs: int, kv_bytes: float) -> float:
        """Least time of a step of `num_seqs` tokens that reads `kv_bytes` of KV: to read all, or to compute it."""
        operations = 2 * num_seqs * (self.layer_weights + self.head_weights)
        reading = (self.weight_bytes(kind) + kv_bytes) / limits.bytes_per_s
        return 1e3 * max(reading, operations / _rate(limits, kind))

    def prefill_ms(self, limits: Limits, kind: str, num_tokens: int) -> float:
        """Least time to compute a prompt and its first token: matrix products, and attention's causal half."""
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * num_tokens * (num_tokens + 1) // 2
        operations = 2 * (num_tokens * self.layer_weights + self.head_weights) + attention
        return 1e3 * max(operations / _rate(limits, kind), self.weight_bytes(kind) / limits.bytes_per_s)


def needs_of(model: Path) -> Needs:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    sizes: dict[str, int] = {}
    for file in model.glob("*.safetensors"):
        for name, entry in _header(file).items():
            if len(entry.get("shape", ())) == 2:
                sizes[name] = entry["shape"][0] * entry["shape"][1]
    embedding = sizes.pop("model.embed_tokens.weight")
    head = sizes.pop("lm_head.weight", embedding)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Needs(sum(sizes.values()), head, config["num_hidden_layers"], heads, head_dim)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as opened:
        [size] = struct.unpack("<Q", opened.read(8))
        header: dict[str, dict[str, Any]] = json.loads(opened.read(size))
        return header


def _rate(limits: Limits, kind: str) -> float:
    return limits.operations_per_s["int8" if kind == "int4" else kind]
