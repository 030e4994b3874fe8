"""Llama, Mistral, Qwen2 and Qwen3 as few large GPU operations: fused kernels between matrix products.

The same decoder as models/dense.py, in the form that a CUDA graph can capture: nothing here waits for the device, and
every size is known from the shapes of the arguments.

Shapes: T tokens of the batch, H heads, K kv heads, D head_dim, E hidden_size, I intermediate_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pagewire_kernels import ops
from torch import Tensor

from pagewire_engine.gpu.attention import KV_SCALE, Attention
from pagewire_engine.gpu.linear import Activation, Fp8Rows, Linear, make_linear, quantize_rows
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.layer import Layer, Tensors, load_ends, load_layer
from pagewire_engine.models.part import VOCABULARY_UNIT
from pagewire_engine.models.rope import RotaryEmbedding
from pagewire_engine.parallel.peers import ALONE, Peers
from pagewire_engine.quantization import Scheme


class GpuModel:
    """The forward pass over one batch of paged sequences; with `peers`, this rank's part of it.

    scheme: how matrices are stored, None for as they are. local: heads and layers that are here.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Tensors,
        max_model_len: int,
        scheme: Scheme | None = None,
        peers: Peers = ALONE,
    ) -> None:
        self.config, self.local, self._peers = config, peers.part.local(config), peers
        self._fp8 = scheme is not None and scheme.name == "fp8"
        self._cos_sin = RotaryEmbedding(config, max_model_len).table(max_model_len)
        ends = load_ends(config, tensors, peers.part)
        self._embedding, self._norm = ends.embedding, ends.norm
        self._layers = [
            load_layer(config, tensors, i, lambda _, weight, bias: make_linear(weight, bias, scheme), peers.part)
            for i in range(*peers.part.layers(config))
        ]
        self._head = None if ends.head is None else make_linear(ends.head, None, scheme and scheme.for_head)

    @property
    def num_weight_bytes(self) -> int:
        """What one decode step reads of the matrices."""
        linears = [linear for layer in self._layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(linear.weight.num_bytes for linear in (*linears, self._head) if linear)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        attention: Attention,
        cache: KVCache,
        layer_done: Callable[[int], None] = lambda layers: None,
        before: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [T, E]; writes the batch's KV into the cache, and tells for how many layers it has.

        Slot -1: a padding row, written nowhere. before: what the stage before gave (overwritten), None on the first.
        What a stage gives that is not the last are the hidden states before the last norm.
        """
        residual = self.embed(input_ids) if before is None else before
        hidden = self.first_norm(residual)
        for index in range(self.num_layers):
            q = self.queries(index, hidden, positions, slot_mapping, cache)
            attended = attention(q, *cache.layer(index), self.window(index))
            layer_done(index + 1)
            hidden = self.after_attention(index, attended, residual)
        assert isinstance(hidden, Tensor)  # the last norm is never quantized
        return hidden

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def window(self, index: int) -> int:
        return self._layers[index].window

    def embed(self, input_ids: Tensor) -> Tensor:
        """[T] -> [T, E]"""
        assert self._embedding is not None
        return self._embedding[input_ids]

    def first_norm(self, residual: Tensor) -> Activation:
        return self._norm_of(None, residual, self._layers[0].input_norm)

    def queries(
        self, index: int, hidden: Activation, positions: Tensor, slot_mapping: Tensor, cache: KVCache,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[T, H, D] of a layer, in `out` if there is one; its keys and values are in the cache then."""
        c, layer = self.local, self._layers[index]
        qkv = layer.qkv(hidden)
        q = qkv.new_empty(len(qkv), c.num_heads, c.head_dim) if out is None else out
        k_cache, v_cache = cache.layer(index)
        ops.rope_write_kv(qkv, positions, self._cos_sin, layer.q_norm, layer.k_norm, c.rms_norm_eps, q,
                          k_cache, v_cache, slot_mapping, KV_SCALE, KV_SCALE)  # fmt: skip
        return q

    def after_attention(self, index: int, attended: Tensor, residual: Tensor) -> Activation:
        """The rest of a layer, and the norm of the next; after the last what forward gives. residual: in place."""
        layer = self._layers[index]
        hidden = self._norm_of(self._project(attended, layer), residual, layer.post_attention_norm)
        down = self._gather(layer.down(self._gated(layer.gate_up, hidden)))
        if index + 1 == self.num_layers:
            return self._final(down, residual)
        return self._norm_of(down, residual, self._layers[index + 1].input_norm)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, E] -> [R, V] in the model's dtype, in `out` if there is one (only where a rank is alone)."""
        assert self._head is not None
        if self._peers.part.ranks == 1:
            return self._head(hidden, out)
        widths = self._peers.part.widths(self.config.vocab_size, VOCABULARY_UNIT)
        return self._peers.gather(self._head(hidden), widths)

    def _gather(self, x: Tensor) -> Tensor:
        """This rank's outputs of o or down -> hidden states."""
        return self._peers.gather(x, self._peers.part.widths(self.config.hidden_size))

    def _final(self, x: Tensor, residual: Tensor) -> Tensor:
        """The last norm; never quantized, since only the head's rows are used."""
        if self._norm is None:
            return residual + x
        out = torch.empty_like(residual)
        ops.rms_norm_residual(x, residual, self._norm, self.config.rms_norm_eps, out)
        return out

    def _norm_of(self, x: Tensor | None, residual: Tensor, weight: Tensor) -> Activation:
        """residual += x, in place; its norm, as the next linear takes it."""
        eps = self.config.rms_norm_eps
        if self._fp8:
            rows = Fp8Rows.empty(len(residual), residual.shape[1], residual.device)
            ops.rms_norm_residual_fp8(x, residual, weight, eps, rows.values, rows.scales)
            return rows
        out = torch.empty_like(residual)
        ops.rms_norm_residual(x, residual, weight, eps, out)
        return out

    def _gated(self, gate_up: Linear, hidden: Activation) -> Activation:
        """What the linear that follows takes."""
        part = self._peers.part
        if self._fp8 and part.ranks == 1:
            both = gate_up(hidden)
            rows = Fp8Rows.empty(len(both), both.shape[1] // 2, both.device)
            ops.silu_and_mul_fp8(both, rows.values, rows.scales)
            return rows
        out = self._peers.gather(gate_up.gated(hidden), part.widths(self.config.intermediate_size))
        return quantize_rows(out) if self._fp8 else out

    def _project(self, attended: Tensor, layer: Layer[Linear]) -> Tensor:
        """What the heads saw, [T, H, D] -> [T, E]."""
        out = attended.view(len(attended), -1)
        out = self._peers.gather(out, [out.shape[1]] * self._peers.part.ranks)
        return self._gather(layer.o(quantize_rows(out) if self._fp8 else out))
