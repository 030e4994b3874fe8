"""Names and shapes of a decoder's weights in a checkpoint, for every runner; each stores a matrix in its own form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pagewire_engine.models.config import ModelConfig

Linear = TypeVar("Linear")


class Tensors(Protocol):
    """Where weights come from: a checkpoint's files, or a generator in a benchmark."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class Layer(Generic[Linear]):
    """One decoder layer; q, k, v and gate, up are fused row-wise."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int


@dataclass(frozen=True)
class Ends:
    """What comes before the first layer and after the last; head is the embedding itself if the two are tied."""

    embedding: Tensor
    norm: Tensor
    head: Tensor


def load_ends(c: ModelConfig, tensors: Tensors) -> Ends:
    shape = (c.vocab_size, c.hidden_size)
    embedding = tensors.take("model.embed_tokens.weight", shape)
    head = embedding if c.tie_word_embeddings else tensors.take("lm_head.weight", shape)
    return Ends(embedding, tensors.take("model.norm.weight", (c.hidden_size,)), head)


def load_layer(
    c: ModelConfig, tensors: Tensors, index: int, make_linear: Callable[[str, Tensor, Tensor | None], Linear]
) -> Layer[Linear]:
    """make_linear: the name of the matrix in Layer, weight [outputs, inputs] and bias -> how it is stored."""
    prefix = f"model.layers.{index}."
    hidden, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    inner = c.intermediate_size

    def linear(name: str, parts: dict[str, int], fan_in: int, bias: bool) -> Linear:
        weights = [tensors.take(f"{prefix}{part}.weight", (rows, fan_in)) for part, rows in parts.items()]
        biases = [tensors.take(f"{prefix}{part}.bias", (rows,)) for part, rows in parts.items() if bias]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return make_linear(name, weight, torch.cat(biases) if bias else None)

    def norm(name: str, size: int) -> Tensor:
        return tensors.take(f"{prefix}{name}.weight", (size,))

    return Layer(
        input_norm=norm("input_layernorm", hidden),
        qkv=linear("qkv", {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}, hidden, c.qkv_bias),
        q_norm=norm("self_attn.q_norm", c.head_dim) if c.qk_norm else None,
        k_norm=norm("self_attn.k_norm", c.head_dim) if c.qk_norm else None,
        o=linear("o", {"self_attn.o_proj": hidden}, q, c.o_bias),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=linear("gate_up", {"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden, c.mlp_bias),
        down=linear("down", {"mlp.down_proj": hidden}, inner, c.mlp_bias),
        window=c.windows[index],
    )
