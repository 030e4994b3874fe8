"""A checkpoint of ours as a GGUF file, so that llama.cpp runs the same weights. Needs the `gguf` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pagewire_bench.random_model import CHAT_TEMPLATE, Tensors, from_bf16

TYPES = ("f16", "bf16", "q8_0", "q4_0")
_MODULES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(directory: Path, kind: str, config: dict[str, Any], tensors: Tensors) -> None:
    """Writes model-<KIND>.gguf beside the checkpoint's tokenizer.json; `kind` is one of TYPES.

    Norms stay float32. Q4_0 keeps the embedding in Q8_0; rows that no multiple of 32 divides are F16.
    """
    import gguf

    family = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(str(directory / f"model-{kind.upper()}.gguf"), family)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, config, json.loads((directory / "tokenizer.json").read_text()))
    for name, bits in tensors.items():
        values, target = from_bf16(bits), gguf_name(name)
        if family == "llama" and target.endswith(("attn_q.weight", "attn_k.weight")):
            is_query = target.endswith("attn_q.weight")
            values = interleave(values, config["num_attention_heads" if is_query else "num_key_value_heads"])
        chosen = gguf.GGMLQuantizationType[_type_of(target, values, kind.upper())]
        writer.add_tensor(target, _encoded(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """'model.layers.3.mlp.up_proj.weight' -> 'blk.3.ffn_up.weight'."""
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_MODULES[module]}.{kind}"


def interleave(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows whose rotary halves follow each other -> rows of pairs, as GGUF's `llama` architecture has them."""
    half = weights.shape[0] // num_heads // 2
    return weights.reshape(num_heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _type_of(target: str, values: np.ndarray, kind: str) -> str:
    if values.ndim == 1:
        return "F32"
    if kind == "Q4_0" and target in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    return "F16" if kind.startswith("Q") and values.shape[-1] % 32 else kind


def _encoded(values: np.ndarray, kind: Any) -> np.ndarray:
    import gguf

    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    encoded: np.ndarray = values.astype(plain) if plain else gguf.quants.quantize(values, kind)
    return encoded


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    import gguf

    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    known = {index: token for token, index in tokenizer["model"]["vocab"].items()} | special
    tokens, kinds = [], []
    for index in range(config["vocab_size"]):
        tokens.append(known.get(index, f"[PAD{index}]"))
        unused_or_normal = gguf.TokenType.NORMAL if index in known else gguf.TokenType.UNUSED
        kinds.append(gguf.TokenType.CONTROL if index in special else unused_or_normal)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
