"""A model of random weights made where it is computed: no files, and its speed is that of the real one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from pagewire_engine.config import EngineConfig
from pagewire_engine.engine import Engine
from pagewire_engine.gpu.kv_cache import GpuKVCache
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.runner import GpuRunner
from pagewire_engine.models.config import ModelConfig, read_config
from pagewire_engine.quantization import SCHEMES
from torch import Tensor

BLOCK_SIZE = 16

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, Any] = LLAMA_3_8B | {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


class RandomWeights:
    """The same name has the same values each time. Scaled so that activations keep their size through depth."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def take(self, name: str, shape: Sequence[int], rows: tuple[int, int] | None = None) -> Tensor:
        assert rows is None
        if len(shape) == 1:
            return torch.ones(tuple(shape), dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(tuple(shape), dtype=self._dtype, device=self._device)
        # Sharper attention than chance gives, or the output would be one token for ever.
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        return weight.normal_(0, 1.0 if "embed" in name else gain * shape[1] ** -0.5, generator=generator)


def model_config(shape: dict[str, Any], device: torch.device) -> ModelConfig:
    return read_config(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)


def make_engine(
    config: ModelConfig,
    limits: EngineConfig,
    *,
    scheme: str | None = None,
    fp8_kv: bool = False,
    graphs: bool = True,
    overlap: bool = True,
) -> tuple[Engine, GpuModel]:
    """On a CUDA device with graphs, unless told otherwise; without prefix hits, which would save what is measured."""
    with torch.inference_mode():
        weights = RandomWeights(config.dtype, config.device)
        model = GpuModel(config, weights, limits.max_model_len, SCHEMES[scheme] if scheme else None)
    kv_dtype = torch.float8_e4m3fn if fp8_kv else config.dtype
    cache = GpuKVCache(config, limits.num_blocks, limits.block_size, kv_dtype)
    runner = GpuRunner(model, cache, limits.max_num_seqs, limits.max_model_len)
    runner.overlaps = overlap
    if graphs and config.device.type == "cuda":
        runner.capture_graphs(limits.max_num_batched_tokens)
    return Engine(runner, limits), model


def limits_for(num_seqs: int, num_tokens: int, num_batched_tokens: int = 2048) -> EngineConfig:
    """Room for `num_seqs` sequences of `num_tokens` and one block more each."""
    blocks = num_seqs * (num_tokens // BLOCK_SIZE + 2)
    return EngineConfig(
        max_model_len=num_tokens + BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        num_blocks=blocks,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_batched_tokens,
        enable_prefix_caching=False,
    )
