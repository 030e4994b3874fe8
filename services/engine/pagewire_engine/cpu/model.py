"""A dense decoder's weights, packed for the compiled CPU step."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from pagewire_kernels.cpu.library import Layer, Model
from pagewire_kernels.cpu.weights import PackedLinear, Quantized

from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.rope import RotaryEmbedding
from pagewire_engine.quantization import Scheme, quantize
from pagewire_engine.weights import Checkpoint


class CpuModel:
    """`fill` completes the structure that the step reads. All tensors it points to live as long as this object."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        checkpoint: Checkpoint,
        max_model_len: int,
        scheme: Scheme | None = None,
    ) -> None:
        self.config = config
        self._library, self._checkpoint, self._scheme = library, checkpoint, scheme
        self._kept: list[Any] = []
        c = config
        self._embedding = checkpoint.take("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)).contiguous()
        self._cos_sin = RotaryEmbedding(config, max_model_len).table(max_model_len).contiguous()
        self._layers = (Layer * c.num_layers)(*[self._layer(i) for i in range(c.num_layers)])
        self._norm = self._vector("model.norm.weight", c.hidden_size)
        head = (
            self._embedding
            if c.tie_word_embeddings
            else checkpoint.take("lm_head.weight", (c.vocab_size, c.hidden_size))
        )
        self._head = self._linear(head, None, scheme.for_head if scheme else None)
        self.weight_bytes = sum(part.num_bytes for part in self._kept if isinstance(part, PackedLinear))

    def fill(self, model: Model) -> None:
        """Points the parts of `model` that the weights decide to this model's memory."""
        c = self.config
        model.hidden, model.intermediate, model.vocab = c.hidden_size, c.intermediate_size, c.vocab_size
        model.eps, model.scale = c.rms_norm_eps, c.head_dim**-0.5
        model.embedding, model.cos_sin, model.norm = self._embedding.data_ptr(), self._cos_sin.data_ptr(), self._norm
        model.head = self._head
        model.layer = ctypes.cast(self._layers, ctypes.POINTER(Layer))

    def _layer(self, index: int) -> Layer:
        c, prefix = self.config, f"model.layers.{index}."
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        inner = c.intermediate_size
        return Layer(
            input_norm=self._vector(f"{prefix}input_layernorm.weight", c.hidden_size),
            post_norm=self._vector(f"{prefix}post_attention_layernorm.weight", c.hidden_size),
            q_norm=self._vector(f"{prefix}self_attn.q_norm.weight", c.head_dim) if c.qk_norm else None,
            k_norm=self._vector(f"{prefix}self_attn.k_norm.weight", c.head_dim) if c.qk_norm else None,
            qkv=self._fused(f"{prefix}self_attn.", {"q_proj": q, "k_proj": kv, "v_proj": kv}, c.hidden_size,
                            c.qkv_bias),
            o=self._fused(f"{prefix}self_attn.", {"o_proj": c.hidden_size}, q, c.o_bias),
            gate_up=self._fused(f"{prefix}mlp.", {"gate_proj": inner, "up_proj": inner}, c.hidden_size, c.mlp_bias,
                                interleave=True),
            down=self._fused(f"{prefix}mlp.", {"down_proj": c.hidden_size}, inner, c.mlp_bias),
            window=c.windows[index],
        )  # fmt: skip

    def _fused(self, prefix: str, parts: dict[str, int], fan_in: int, bias: bool, *, interleave: bool = False) -> Any:
        take = self._checkpoint.take
        weights = [take(f"{prefix}{name}.weight", (rows, fan_in)) for name, rows in parts.items()]
        biases = [take(f"{prefix}{name}.bias", (rows,)) for name, rows in parts.items() if bias]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return self._linear(weight, torch.cat(biases) if bias else None, self._scheme, interleave=interleave)

    def _linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, scheme: Scheme | None, *, interleave: bool = False
    ) -> Any:
        packed = PackedLinear(self._library, _quantized(weight, scheme), bias, interleave=interleave)
        self._kept.append(packed)
        return packed.struct

    def _vector(self, name: str, size: int) -> int:
        vector = self._checkpoint.take(name, (size,)).float().contiguous()
        self._kept.append(vector)
        return vector.data_ptr()


def _quantized(weight: torch.Tensor, scheme: Scheme | None) -> torch.Tensor | Quantized:
    if scheme is None:
        return weight
    made = quantize(weight, scheme)
    return Quantized(made.q, made.scales, scheme.group, 4 if scheme.name == "int4" else 8)
