"""A dense decoder's weights, packed for the compiled CPU step."""

from __future__ import annotations

import ctypes

import torch
from pagewire_kernels.cpu.library import Layer as LayerStruct
from pagewire_kernels.cpu.library import Model
from pagewire_kernels.cpu.weights import PackedLinear, Quantized

from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.layer import Layer, Tensors, load_ends, load_layer
from pagewire_engine.models.rope import RotaryEmbedding
from pagewire_engine.quantization import Scheme, quantize


class CpuModel:
    """`fill` completes the structure that the step reads. All memory it points to lives as long as this object."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        tensors: Tensors,
        max_model_len: int,
        scheme: Scheme | None = None,
    ) -> None:
        self.config = config
        self._vectors: list[torch.Tensor] = []

        def linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
            return PackedLinear(library, _quantized(weight, scheme), bias, interleave=name == "gate_up")

        self._cos_sin = RotaryEmbedding(config, max_model_len).table(max_model_len).contiguous()
        self._layers = [load_layer(config, tensors, i, linear) for i in range(config.num_layers)]
        self._structs = (LayerStruct * config.num_layers)(*map(self._struct, self._layers))
        ends = load_ends(config, tensors)
        self._embedding, self._norm = ends.embedding.contiguous(), self._vector(ends.norm)
        self._head = PackedLinear(library, _quantized(ends.head, scheme and scheme.for_head))
        matrices = [m for layer in self._layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        self.weight_bytes = sum(matrix.num_bytes for matrix in (*matrices, self._head))

    def fill(self, model: Model) -> None:
        """Points the parts of `model` that the weights decide to this model's memory."""
        c = self.config
        model.hidden, model.intermediate, model.vocab = c.hidden_size, c.intermediate_size, c.vocab_size
        model.eps, model.scale = c.rms_norm_eps, c.head_dim**-0.5
        model.embedding, model.cos_sin, model.norm = self._embedding.data_ptr(), self._cos_sin.data_ptr(), self._norm
        model.head = self._head.struct
        model.layer = ctypes.cast(self._structs, ctypes.POINTER(LayerStruct))

    def _struct(self, layer: Layer[PackedLinear]) -> LayerStruct:
        return LayerStruct(
            input_norm=self._vector(layer.input_norm),
            post_norm=self._vector(layer.post_attention_norm),
            q_norm=self._vector(layer.q_norm),
            k_norm=self._vector(layer.k_norm),
            qkv=layer.qkv.struct,
            o=layer.o.struct,
            gate_up=layer.gate_up.struct,
            down=layer.down.struct,
            window=layer.window,
        )

    def _vector(self, vector: torch.Tensor | None) -> int | None:
        """The address of its float32 form, which is kept."""
        if vector is None:
            return None
        self._vectors.append(vector.float().contiguous())
        return self._vectors[-1].data_ptr()


def _quantized(weight: torch.Tensor, scheme: Scheme | None) -> torch.Tensor | Quantized:
    if scheme is None:
        return weight
    made = quantize(weight, scheme)
    return Quantized(made.q, made.scales, scheme.group, 4 if scheme.name == "int4" else 8)
