"""Llama, Mistral, Qwen2 and Qwen3: one dense decoder, top to bottom.

Shapes: T tokens of the batch, H heads, K kv heads, D head_dim, E hidden_size, I intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pagewire_kernels import ops
from torch.nn import functional as F

from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.layer import Layer, load_ends, load_layer
from pagewire_engine.models.rope import RotaryEmbedding
from pagewire_engine.step_tensors import StepTensors
from pagewire_engine.weights import Checkpoint


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class DenseModel:
    """The forward pass over one batch of paged sequences."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, max_model_len: int) -> None:
        self.config = config
        self._rotary = RotaryEmbedding(config, max_model_len)
        self._scale = config.head_dim**-0.5
        ends = load_ends(config, checkpoint)
        self._embedding, self._norm, self._head = ends.embedding, ends.norm, ends.head
        self._layers = [
            load_layer(config, checkpoint, i, lambda _, weight, bias: Linear(weight, bias))
            for i in range(config.num_layers)
        ]

    def forward(self, batch: StepTensors, cache: KVCache) -> torch.Tensor:
        """Final hidden states [T, E]; writes the batch's KV into the cache."""
        x = self._embedding[batch.input_ids]
        cos, sin = self._rotary(batch.positions)
        for index, layer in enumerate(self._layers):
            x = x + self._attention(ops.rms_norm(x, layer.input_norm, self.config.rms_norm_eps), layer, index, cos, sin,
                                    batch, cache)  # fmt: skip
            hidden = ops.rms_norm(x, layer.post_attention_norm, self.config.rms_norm_eps)
            x = x + layer.down(ops.silu_and_mul(layer.gate_up(hidden)))
        return ops.rms_norm(x, self._norm, self.config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> float32 [R, vocabulary]."""
        return F.linear(hidden, self._head).float()

    def _attention(
        self, x: torch.Tensor, layer: Layer[Linear], index: int, cos: torch.Tensor, sin: torch.Tensor,
        batch: StepTensors, cache: KVCache,
    ) -> torch.Tensor:  # fmt: skip
        c = self.config
        q, k, v = layer.qkv(x).split((c.num_heads * c.head_dim, *[c.num_kv_heads * c.head_dim] * 2), -1)
        q, k, v = (t.view(len(x), -1, c.head_dim) for t in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = ops.rms_norm(q, layer.q_norm, c.rms_norm_eps), ops.rms_norm(k, layer.k_norm, c.rms_norm_eps)
        q, k = ops.rope(q, k, cos, sin)
        k_cache, v_cache = cache.layer(index)
        ops.write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        out = self._attend(q, k_cache, v_cache, batch, layer.window)
        return layer.o(out.reshape(len(x), -1))

    def _attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: StepTensors, window: int
    ) -> torch.Tensor:
        parts = []
        if batch.decode is not None:
            rows = batch.decode
            parts.append(
                ops.paged_decode(q[: batch.num_decode], k_cache, v_cache, rows.block_tables, rows.seq_lens,
                                 self._scale, window)
            )  # fmt: skip
        if batch.prefill is not None:
            chunks = batch.prefill
            parts.append(
                ops.paged_prefill(q[batch.num_decode :], k_cache, v_cache, chunks.block_tables, chunks.cu_seqlens_q,
                                  chunks.seq_lens, self._scale, window)
            )  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)
