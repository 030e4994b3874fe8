"""A model's shape, read from a Hugging Face config.json (old and new spellings)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pagewire_core.errors import StartupError

_ROPE_NUMBERS = (
    "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder: RMSNorm, rotary positions, grouped-query attention, SiLU-gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Mapping[str, Any]  # rope_type, rope_theta and what the type needs
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # per layer; 0: full attention
    dtype: torch.dtype
    device: torch.device

    @property
    def attention_work(self) -> float:
        """FLOPs of attending to one token, as a share of those of a token's matrices; layers with a window left out."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)
        return 2 * queries * self.windows.count(0) / (weights * self.num_layers)


def read_config(hf: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> ModelConfig:
    """Raises StartupError if the architecture or one of its options is not supported."""
    named = (hf.get("architectures") or ["?"])[0]
    architecture = re.sub("Model$", "ForCausalLM", named)  # a model that was saved without its head
    if architecture not in ARCHITECTURES:
        raise StartupError(f"architecture {named} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if hf.get("hidden_act", "silu") != "silu":
        raise StartupError(f"activation {hf['hidden_act']!r} is not supported; only silu is")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "?")
        raise StartupError(
            f"the checkpoint is quantized ({method}), which is not supported yet; use an unquantized one"
        )
    if hf.get("is_causal") is False:
        raise StartupError("is_causal is false: models whose tokens see those after them are not supported")
    try:
        heads = hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise StartupError(f"{heads} attention heads cannot share {kv_heads} kv heads: config.json is wrong")
        layers = hf["num_hidden_layers"]
        bias = bool(hf.get("attention_bias", False))
        return ModelConfig(
            architecture=architecture,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            rope=_rope(hf),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM" or bias,
            o_bias=architecture != "Qwen2ForCausalLM" and bias,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            windows=_windows(hf, architecture, layers),
            dtype=dtype,
            device=device,
        )
    except KeyError as error:
        raise StartupError(f"config.json lacks {error.args[0]!r}; the model directory is incomplete") from None


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """One dict from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old, and of the two the one that is
    written by hand to stretch a model).
    """
    parameters = hf.get("rope_parameters") or {}
    rope = dict(hf.get("rope_scaling") or parameters)
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", "default")
    rope["rope_theta"] = rope.get("rope_theta") or hf.get("rope_theta") or parameters.get("rope_theta") or 10000.0
    if rope["rope_type"] in ("yarn", "llama3") and (trained := hf.get("original_max_position_embeddings")):
        rope["original_max_position_embeddings"] = trained
    for name in _ROPE_NUMBERS:
        if not isinstance(rope.get(name) or 0, int | float):
            raise StartupError(f"config.json's RoPE has {name} {rope[name]!r}, which is not a number")
    if rope["rope_type"] in ("yarn", "llama3"):
        longest = hf.get("max_position_embeddings", 2048)
        trained = rope["original_max_position_embeddings"] = rope.get("original_max_position_embeddings") or longest
        if rope["rope_type"] == "yarn":
            rope["factor"] = rope.get("factor") or longest / trained
    return rope


def _windows(hf: Mapping[str, Any], architecture: str, layers: int) -> tuple[int, ...]:
    window = hf.get("sliding_window", 4096 if architecture == "MistralForCausalLM" else None) or 0
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    if architecture == "LlamaForCausalLM" or not hf.get("use_sliding_window", False):
        return (0,) * layers
    first = hf.get("max_window_layers", 28)
    types = hf.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
