"""Tiny random checkpoints of every native architecture, made on the spot, and their reference answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 320
SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}  # fmt: skip


def make_model(path: Path, architecture: str, *, shard_size: str = "5GB", seed: int = 0, **changes: Any) -> Path:
    """Writes a random checkpoint whose greedy output varies, in float32, with a byte-level tokenizer."""
    options = BASE | ARCHITECTURES[architecture] | changes
    model_type = options.pop("model_type")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains that make attention peaked and logits spread: greedy output varies, near-ties are rare.
            gain = 2.0 if "q_proj.weight" in name or "k_proj.weight" in name else 1.0
            if parameter.ndim == 2:
                # A tied embedding of full size would drown the layers: every token would repeat itself.
                parameter.normal_(0, 0.05 if "embed" in name else gain / parameter.shape[1] ** 0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(1, 0.05)
    model.save_pretrained(path, max_shard_size=shard_size)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """Bytes as tokens: any text round-trips, and text of length n has n ASCII tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices so small take twenty times as long on two threads, where something else wants the cores, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def reference_model(path: Path) -> PreTrainedModel:
    """The plain reference: transformers on the same weights, float32, eager attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@_one_thread()
@torch.inference_mode()
def reference_greedy(path: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy continuation without a KV cache, and the log probability of each token.

    A cache proposes; one pass over everything without one decides, and what it disagrees with is proposed anew.
    """
    model, tokens = reference_model(path), list(prompt)
    while True:
        _propose(model, tokens, len(prompt) + num_tokens)
        logits = model(torch.tensor([tokens[:-1]]), use_cache=False, logits_to_keep=num_tokens).logits[0]
        chosen = logits.argmax(-1).tolist()
        if chosen == tokens[len(prompt) :]:
            logprobs = torch.log_softmax(logits, -1)
            return chosen, logprobs[range(num_tokens), chosen].tolist()
        agreed = next(i for i, token in enumerate(chosen) if token != tokens[len(prompt) + i])
        del tokens[len(prompt) + agreed :]
        tokens.append(chosen[agreed])


def _propose(model: Any, tokens: list[int], length: int) -> None:
    """Greedy tokens at the end of the list until it is so long."""
    seen, cache = 0, None
    while len(tokens) < length:
        out = model(torch.tensor([tokens[seen:]]), past_key_values=cache, use_cache=True)
        seen, cache = len(tokens), out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))


@_one_thread()
@torch.inference_mode()
def reference_beams(
    path: Path,
    prompt: list[int],
    width: int,
    num_tokens: int,
    length_penalty: float = 1.0,
    eos: Sequence[int] = (2,),
) -> list[tuple[list[int], float]]:
    """vLLM's beam search without a KV cache: the best `width` sequences with the end that they have, and their sums.

    eos: what ends a sequence; pass none for ignore_eos. All rounds are run, and all that ended is kept.
    """
    model, live, ended = reference_model(path), [(list(prompt), 0.0)], list[tuple[list[int], float]]()
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens for tokens, _ in live]), use_cache=False).logits[:, -1]
        best = torch.log_softmax(logits, -1).topk(2 * width)
        found = [
            ([*tokens, int(token)], total + float(logprob))
            for (tokens, total), ids, logprobs in zip(live, best.indices, best.values, strict=True)
            for token, logprob in zip(ids, logprobs, strict=True)
        ]
        ended += [(tokens, total) for tokens, total in found if tokens[-1] in eos]
        others = [(tokens, total) for tokens, total in found if tokens[-1] not in eos]
        live = sorted(others, key=lambda beam: -beam[1])[:width]
        if not live:
            break

    def score(beam: tuple[list[int], float]) -> float:
        tokens, total = beam
        return total / (len(tokens) - (tokens[-1] in eos)) ** length_penalty

    return [(tokens[len(prompt) :], total) for tokens, total in sorted(ended + live, key=score, reverse=True)[:width]]


@_one_thread()
@torch.inference_mode()
def reference_logprobs(path: Path, prompt: list[int]) -> torch.Tensor:
    """Log probabilities [len(prompt) - 1, VOCAB]: what could have come in the place of each token but the first."""
    return torch.log_softmax(reference_model(path)(torch.tensor([prompt]), use_cache=False).logits[0, :-1], -1)
