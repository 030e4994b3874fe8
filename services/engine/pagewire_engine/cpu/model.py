"""A dense decoder's weights, packed for the compiled CPU step."""

from __future__ import annotations

import ctypes

import torch
from pagewire_kernels.cpu.library import GATHER, Model
from pagewire_kernels.cpu.library import Layer as LayerStruct
from pagewire_kernels.cpu.library import Peers as PeersStruct
from pagewire_kernels.cpu.weights import PackedLinear, Quantized

from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.layer import Layer, Tensors, load_ends, load_layer
from pagewire_engine.models.rope import RotaryEmbedding
from pagewire_engine.parallel.peers import ALONE, Peers
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
        peers: Peers = ALONE,
    ) -> None:
        self.config, self.peers = config, peers
        self._vectors: list[torch.Tensor] = []
        self._failure: Exception | None = None
        self._gather = GATHER(self._gather_bytes)

        def linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
            return PackedLinear(library, _quantized(weight, scheme), bias, interleave=name == "gate_up")

        self._cos_sin = RotaryEmbedding(config, max_model_len).table(max_model_len).contiguous()
        layers = range(*peers.part.layers(config))
        self._layers = [load_layer(config, tensors, i, linear, peers.part) for i in layers]
        self._structs = (LayerStruct * len(layers))(*map(self._struct, self._layers))
        ends = load_ends(config, tensors, peers.part)
        self._embedding = None if ends.embedding is None else ends.embedding.contiguous()
        self._norm = self._vector(ends.norm)
        heads = [] if ends.head is None else [PackedLinear(library, _quantized(ends.head, scheme and scheme.for_head))]
        self._head = heads[0] if heads else None
        matrices = [m for layer in self._layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        self.weight_bytes = sum(matrix.num_bytes for matrix in (*matrices, *heads))

    def fill(self, model: Model) -> None:
        """Points the parts of `model` that the weights decide to this model's memory."""
        c = self.config
        model.hidden, model.intermediate, model.vocab = c.hidden_size, c.intermediate_size, c.vocab_size
        model.eps, model.scale = c.rms_norm_eps, c.head_dim**-0.5
        model.embedding = None if self._embedding is None else self._embedding.data_ptr()
        model.cos_sin, model.norm = self._cos_sin.data_ptr(), self._norm
        if self._head is not None:
            model.head = self._head.struct
        model.peers = PeersStruct(self.peers.part.rank, self.peers.part.ranks, self._gather)
        model.layer = ctypes.cast(self._structs, ctypes.POINTER(LayerStruct))

    def raise_failure(self) -> None:
        """Raises what a gathering of the last step failed with."""
        assert self._failure is not None
        raise self._failure

    def _gather_bytes(self, mine: int, everyones: int, num_bytes: int) -> int:
        try:
            self.peers.gather_bytes(_memory(mine, num_bytes), _memory(everyones, num_bytes * self.peers.part.ranks))
        except Exception as error:  # must not pass through the compiled step
            self._failure = error
            return 1
        return 0

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


def _memory(address: int, num_bytes: int) -> torch.Tensor:
    """The bytes there as a tensor, without a copy."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def _quantized(weight: torch.Tensor, scheme: Scheme | None) -> torch.Tensor | Quantized:
    if scheme is None:
        return weight
    made = quantize(weight, scheme)
    return Quantized(made.q, made.scales, scheme.group, 4 if scheme.name == "int4" else 8)
