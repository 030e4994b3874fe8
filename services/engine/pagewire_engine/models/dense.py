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
from pagewire_engine.models.rope import RotaryEmbedding
from pagewire_engine.step_tensors import StepTensors
from pagewire_engine.weights import Checkpoint


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; q, k, v and gate, up are fused row-wise."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_attention_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int


class DenseModel:
    """The forward pass over one batch of paged sequences."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, max_model_len: int) -> None:
        self.config = config
        self._rotary = RotaryEmbedding(config, max_model_len)
        self._scale = config.head_dim**-0.5
        self._embedding = checkpoint.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
        self._layers = [_load_layer(config, checkpoint, i) for i in range(config.num_layers)]
        self._norm = checkpoint.take("model.norm.weight", (config.hidden_size,))
        self._head = (
            self._embedding
            if config.tie_word_embeddings
            else checkpoint.take("lm_head.weight", (config.vocab_size, config.hidden_size))
        )

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
        self, x: torch.Tensor, layer: Layer, index: int, cos: torch.Tensor, sin: torch.Tensor,
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


def _load_layer(c: ModelConfig, checkpoint: Checkpoint, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    hidden, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def linear(parts: dict[str, int], fan_in: int, bias: bool) -> Linear:
        weight = torch.cat([checkpoint.take(f"{prefix}{name}.weight", (rows, fan_in)) for name, rows in parts.items()])
        biases = [checkpoint.take(f"{prefix}{name}.bias", (rows,)) for name, rows in parts.items() if bias]
        return Linear(weight, torch.cat(biases) if bias else None)

    def norm(name: str, size: int) -> torch.Tensor:
        return checkpoint.take(f"{prefix}{name}.weight", (size,))

    return Layer(
        input_norm=norm("input_layernorm", hidden),
        qkv=linear({"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}, hidden, c.qkv_bias),
        q_norm=norm("self_attn.q_norm", c.head_dim) if c.qk_norm else None,
        k_norm=norm("self_attn.k_norm", c.head_dim) if c.qk_norm else None,
        o=linear({"self_attn.o_proj": hidden}, q, c.o_bias),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=linear({"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}, hidden, c.mlp_bias),
        down=linear({"mlp.down_proj": hidden}, c.intermediate_size, c.mlp_bias),
        window=c.windows[index],
    )
