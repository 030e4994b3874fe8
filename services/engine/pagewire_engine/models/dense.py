"""Llama, Mistral, Qwen2 and Qwen3: one dense decoder, top to bottom.

Shapes: T tokens of the batch, H heads, K kv heads, D head_dim, E hidden_size, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pagewire_kernels import ops
from torch.nn import functional as F

from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.layer import Layer, Tensors, load_ends, load_layer
from pagewire_engine.models.part import VOCABULARY_UNIT
from pagewire_engine.models.rope import RotaryEmbedding
from pagewire_engine.parallel.peers import ALONE, Peers
from pagewire_engine.step_tensors import StepTensors


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class DenseModel:
    """The forward pass over one batch of paged sequences; with `peers`, this rank's part of it."""

    def __init__(self, config: ModelConfig, tensors: Tensors, max_model_len: int, peers: Peers = ALONE) -> None:
        self.config, self._peers = config, peers
        self._local = peers.part.local(config)
        self._rotary = RotaryEmbedding(config, max_model_len)
        self._scale = config.head_dim**-0.5
        self._ends = load_ends(config, tensors, peers.part)
        self._layers = [
            load_layer(config, tensors, i, lambda _, weight, bias: Linear(weight, bias), peers.part)
            for i in range(*peers.part.layers(config))
        ]

    def forward(
        self,
        batch: StepTensors,
        cache: KVCache,
        hidden: torch.Tensor | None = None,
        layer_done: Callable[[int], None] = lambda layers: None,
    ) -> torch.Tensor:
        """Hidden states [T, E] after the layers; writes the batch's KV into the cache.

        hidden: what the stage before gave; None on the first. layer_done: told for how many layers it is there.
        """
        if hidden is None:
            assert self._ends.embedding is not None
            hidden = self._ends.embedding[batch.input_ids]
        x, c = hidden, self.config
        cos, sin = self._rotary(batch.positions)
        for index, layer in enumerate(self._layers):
            x = x + self._attention(ops.rms_norm(x, layer.input_norm, c.rms_norm_eps), layer, index, cos, sin,
                                    batch, cache)  # fmt: skip
            layer_done(index + 1)
            gate_up = layer.gate_up(ops.rms_norm(x, layer.post_attention_norm, c.rms_norm_eps))
            activated = self._gather(ops.silu_and_mul(gate_up), c.intermediate_size)
            x = x + self._gather(layer.down(activated), c.hidden_size)
        return x

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last norm of [R, E]; on the last stage."""
        assert self._ends.norm is not None
        return ops.rms_norm(hidden, self._ends.norm, self.config.rms_norm_eps)

    def logits(self, final: torch.Tensor) -> torch.Tensor:
        """`final` states [R, E] -> float32 [R, vocabulary]; on the last stage."""
        assert self._ends.head is not None
        logits = F.linear(final, self._ends.head)
        return self._peers.gather(logits, self._peers.part.widths(self.config.vocab_size, VOCABULARY_UNIT)).float()

    def _gather(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """All outputs of a matrix, of which `x` are this rank's."""
        return self._peers.gather(x, self._peers.part.widths(total))

    def _attention(
        self, x: torch.Tensor, layer: Layer[Linear], index: int, cos: torch.Tensor, sin: torch.Tensor,
        batch: StepTensors, cache: KVCache,
    ) -> torch.Tensor:  # fmt: skip
        c = self._local
        q, k, v = layer.qkv(x).split((c.num_heads * c.head_dim, *[c.num_kv_heads * c.head_dim] * 2), -1)
        q, k, v = (t.view(len(x), -1, c.head_dim) for t in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = ops.rms_norm(q, layer.q_norm, c.rms_norm_eps), ops.rms_norm(k, layer.k_norm, c.rms_norm_eps)
        q, k = ops.rope(q, k, cos, sin)
        k_cache, v_cache = cache.layer(index)
        ops.write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        out = self._attend(q, k_cache, v_cache, batch, layer.window).reshape(len(x), -1)
        out = self._peers.gather(out, [out.shape[1]] * self._peers.part.ranks)
        return self._gather(layer.o(out), c.hidden_size)

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
