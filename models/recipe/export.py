"""Write the demo model's directory: tokenizer, configurations and weights under Hugging Face names."""

import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from corpus import SPECIAL_TOKENS, documents
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

CONTEXT = 2048
PAD, BOS, EOS, IM_START, IM_END = range(len(SPECIAL_TOKENS))
TOKENIZER_DOCUMENTS = (20_000, 500)  # short and long


def write_json(path: Path, value: object) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def training_text(seed: int) -> Iterable[str]:
    """Documents for the tokenizer."""
    for long, count in zip((False, True), TOKENIZER_DOCUMENTS, strict=True):
        for document in islice(documents(seed, long), count):
            yield "".join(segment.text for segment in document)


def train_tokenizer(output: Path, seed: int) -> None:
    """Byte-level BPE over all 256 bytes, so that any UTF-8 text survives; digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=20,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(training_text(seed), trainer)
    tokenizer.save(str(output / "tokenizer.json"))


def write_tokenizer_config(output: Path) -> None:
    """Write the special tokens' roles and the chat template beside tokenizer.json."""
    roles = {"bos_token": SPECIAL_TOKENS[BOS], "eos_token": SPECIAL_TOKENS[IM_END], "pad_token": SPECIAL_TOKENS[PAD]}
    write_json(output / "special_tokens_map.json", roles)
    template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": template.strip(),
            "added_tokens_decoder": {
                str(i): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for i, token in enumerate(SPECIAL_TOKENS)
            },
        },
    )


def load_tokenizer(output: Path) -> Tokenizer:
    """The tokenizer of the directory."""
    return Tokenizer.from_file(str(output / "tokenizer.json"))


def write_config(output: Path, vocab_size: int) -> None:
    """Write config.json and generation_config.json."""
    write_json(
        output / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": CONTEXT,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": BOS,
            "eos_token_id": IM_END,
            "pad_token_id": PAD,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        output / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": [IM_END, EOS], "pad_token_id": PAD, "do_sample": False},
    )


def write_weights(output: Path, model: LlamaForCausalLM) -> None:
    """Write the weights in bf16, atomically; the tied head is left out."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    unfinished = output / "model.safetensors.unfinished"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)
    os.replace(unfinished, output / "model.safetensors")
