"""Names and shapes of a decoder's weights in a checkpoint, for every runner; each stores a matrix in its own form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.part import VOCABULARY_UNIT, WHOLE, Part, Range

Linear = TypeVar("Linear")


class Tensors(Protocol):
    """Where weights come from: a checkpoint's files, or a generator in a benchmark."""

    def take(self, name: str, shape: tuple[int, ...], rows: Range | None = None) -> Tensor:
        """The tensor of that shape, or some of its rows."""
        ...


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
    """What comes before the first layer and after the last, as far as a part has it.

    The head of a whole model is the embedding itself if the two are tied.
    """

    embedding: Tensor | None
    norm: Tensor | None
    head: Tensor | None


def load_ends(c: ModelConfig, tensors: Tensors, part: Part = WHOLE) -> Ends:
    name, shape = "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    embedding = tensors.take(name, shape) if part.is_first else None
    if not part.is_last:
        return Ends(embedding, None, None)
    norm = tensors.take("model.norm.weight", (c.hidden_size,))
    rows = _if_divided(part, part.outputs(c.vocab_size, VOCABULARY_UNIT))
    if c.tie_word_embeddings and embedding is not None:
        return Ends(embedding, norm, embedding[slice(*rows)] if rows else embedding)
    return Ends(embedding, norm, tensors.take(name if c.tie_word_embeddings else "lm_head.weight", shape, rows))


def load_layer(
    c: ModelConfig,
    tensors: Tensors,
    index: int,
    make_linear: Callable[[str, Tensor, Tensor | None], Linear],
    part: Part = WHOLE,
) -> Layer[Linear]:
    """One of the whole model's layers; of its matrices the part's outputs.

    make_linear: the name of the matrix in Layer, weight [outputs, inputs] and bias -> how it is stored.
    """
    prefix = f"model.layers.{index}."
    hidden, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    inner = c.intermediate_size
    q_rows, kv_rows = _heads(part.heads(c), c), _heads(part.kv_heads(c), c)
    hidden_rows, inner_rows = part.outputs(hidden), part.outputs(inner)

    def linear(name: str, matrices: dict[str, tuple[int, Range]], fan_in: int, bias: bool) -> Linear:
        def take(end: str, *columns: int) -> list[Tensor]:
            return [
                tensors.take(f"{prefix}{matrix}.{end}", (outputs, *columns), _if_divided(part, rows))
                for matrix, (outputs, rows) in matrices.items()
            ]

        weights = take("weight", fan_in)
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return make_linear(name, weight, torch.cat(take("bias")) if bias else None)

    def norm(name: str, size: int) -> Tensor:
        return tensors.take(f"{prefix}{name}.weight", (size,))

    qkv = {"self_attn.q_proj": (q, q_rows), "self_attn.k_proj": (kv, kv_rows), "self_attn.v_proj": (kv, kv_rows)}
    return Layer(
        input_norm=norm("input_layernorm", hidden),
        qkv=linear("qkv", qkv, hidden, c.qkv_bias),
        q_norm=norm("self_attn.q_norm", c.head_dim) if c.qk_norm else None,
        k_norm=norm("self_attn.k_norm", c.head_dim) if c.qk_norm else None,
        o=linear("o", {"self_attn.o_proj": (hidden, hidden_rows)}, q, c.o_bias),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=linear("gate_up", {"mlp.gate_proj": (inner, inner_rows), "mlp.up_proj": (inner, inner_rows)}, hidden,
                       c.mlp_bias),
        down=linear("down", {"mlp.down_proj": (hidden, hidden_rows)}, inner, c.mlp_bias),
        window=c.windows[index],
    )  # fmt: skip


def _heads(heads: Range, c: ModelConfig) -> Range:
    return heads[0] * c.head_dim, heads[1] * c.head_dim


def _if_divided(part: Part, rows: Range) -> Range | None:
    return rows if part.ranks > 1 else None
