"""Checkpoints with random weights, in the shapes of real architectures: speed does not depend on what weights say.

The same arguments give the same weights, byte for byte. Weights are scaled so that activations keep their order of
magnitude through depth; the query and key projections are larger, as attention would else be uniform and greedy output
one token for ever.
"""

from __future__ import annotations

import json
import struct
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DTYPES = {"uint16": "BF16", "int8": "I8", "int32": "I32", "int64": "I64"}
_CORPUS_BYTES = 12e6
_QK_GAIN = 2.0

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    max_position_embeddings: int
    tied: bool = True


SHAPES = {
    "micro": Shape(64, 176, 2, 4, 2, 16, 512, 1e4, 512),
    "tiny": Shape(384, 1024, 8, 6, 2, 64, 8192, 1e4, 2048),
    "smol135": Shape(576, 1536, 30, 9, 3, 64, 49152, 1e5, 8192),  # SmolLM2-135M
    "smol360": Shape(960, 2560, 32, 15, 5, 64, 49152, 1e5, 8192),  # SmolLM2-360M
    "half": Shape(896, 4864, 24, 14, 2, 64, 151936, 1e6, 32768),  # Qwen2.5-0.5B
    "l1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, 5e5, 8192),  # Llama-3.2-1B
}


def hf_config(shape: Shape, architecture: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json as transformers reads it."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]], "model_type": architecture,
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings, "rope_theta": shape.rope_theta,
        "rope_scaling": None, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": shape.tied,
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "bos_token_id": tokenizer.token_to_id("<|bos|>"), "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|pad|>"), "torch_dtype": "bfloat16", "use_cache": True,
    }  # fmt: skip
    if architecture != "llama":
        config["sliding_window"] = None
    if architecture.startswith("qwen"):
        config |= {"use_sliding_window": False, "max_window_layers": shape.num_layers}
    return config


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the source text of Python's standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((path.read_text("utf-8", "ignore") for path in _corpus()), trainer)
    return tokenizer


def _corpus() -> Iterator[Path]:
    root, total = Path(sysconfig.get_paths()["stdlib"]), 0
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or total > _CORPUS_BYTES:
            continue
        total += path.stat().st_size
        yield path


def random_weights(shape: Shape, architecture: str, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names as in Hugging Face checkpoints, and bfloat16 as its bits, uint16."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return to_bf16(rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain))

    def norm(size: int) -> np.ndarray:
        return to_bf16(1.0 + 0.05 * rng.standard_normal(size, dtype=np.float32))

    hidden, inter = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    unit, residual = hidden**-0.5, (2 * shape.num_layers) ** -0.5
    yield "model.embed_tokens.weight", matrix(shape.vocab_size, hidden, 0.05)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", norm(hidden)
        for name, size, gain in (("q", queries, _QK_GAIN), ("k", keys, _QK_GAIN), ("v", keys, 1.0)):
            yield prefix + f"self_attn.{name}_proj.weight", matrix(size, hidden, gain * unit)
            if architecture == "qwen2":
                bias = 0.1 * rng.standard_normal(size, dtype=np.float32)
                yield prefix + f"self_attn.{name}_proj.bias", to_bf16(bias)
        if architecture == "qwen3":
            yield prefix + "self_attn.q_norm.weight", norm(shape.head_dim)
            yield prefix + "self_attn.k_norm.weight", norm(shape.head_dim)
        yield prefix + "self_attn.o_proj.weight", matrix(hidden, queries, residual * queries**-0.5)
        yield prefix + "post_attention_layernorm.weight", norm(hidden)
        yield prefix + "mlp.gate_proj.weight", matrix(inter, hidden, unit)
        yield prefix + "mlp.up_proj.weight", matrix(inter, hidden, unit)
        yield prefix + "mlp.down_proj.weight", matrix(hidden, inter, residual * inter**-0.5)
    yield "model.norm.weight", norm(hidden)
    if not shape.tied:
        yield "lm_head.weight", matrix(shape.vocab_size, hidden, unit)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16 (uint16), rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """One safetensors file; uint16 stands for the bits of bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        offsets = [offset, offset := offset + values.nbytes]
        header[name] = {"dtype": _DTYPES[values.dtype.name], "shape": list(values.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for values in tensors.values():
            file.write(values.tobytes())


def write_settings(directory: Path, config: dict[str, Any]) -> None:
    """Everything beside weights and tokenizer.json."""
    specials = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "special_tokens_map.json": specials,
        "tokenizer_config.json": {
            **specials,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
