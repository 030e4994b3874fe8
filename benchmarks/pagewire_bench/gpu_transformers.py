"""transformers on the same random weights and the same device: what it computes, and how fast it serves."""

from __future__ import annotations

import time
from typing import Any

import torch
from pagewire_engine.models.config import ModelConfig
from torch import Tensor

from pagewire_bench.gpu_model import RandomWeights


def last_log_probabilities(
    shape: dict[str, Any], config: ModelConfig, prompts: list[list[int]], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """float32 [V] for each prompt's next token, on the CPU; prompts computed one by one, in the model's dtype or
    with the same weights in another."""
    model = _load(shape, config)
    if dtype is not None:
        model = model.to(dtype)
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt], device=config.device)).logits[0, -1].float() for prompt in prompts]
        return [torch.log_softmax(row, -1).cpu() for row in logits]


def generate_batch_seconds(
    shape: dict[str, Any], config: ModelConfig, prompts: list[list[int]], num_tokens: int
) -> float:
    """Of its continuous batching, all prompts at once, greedy, after a short run of the same."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = _load(shape, config)
    # On a GPU its own choice of everything; of a CPU's memory it would take nearly all.
    batching = ContinuousBatchingConfig() if config.device.type == "cuda" else ContinuousBatchingConfig(num_blocks=16)
    for count in (2, num_tokens):
        generation = GenerationConfig(do_sample=False, max_new_tokens=count, eos_token_id=-1, pad_token_id=0)
        started = time.perf_counter()
        outputs = model.generate_batch(
            inputs=prompts, generation_config=generation, continuous_batching_config=batching
        )
        seconds = time.perf_counter() - started
    assert sum(len(output.generated_tokens) for output in outputs.values()) == len(prompts) * num_tokens
    return seconds


def _load(shape: dict[str, Any], config: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {name: value for name, value in shape.items() if name not in ("architectures", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    hf = AutoConfig.for_model("llama", **options, rope_parameters=rope)
    weights = RandomWeights(config.dtype, config.device)
    with torch.device(config.device):
        model = AutoModelForCausalLM.from_config(hf, dtype=config.dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.take(name, parameter.shape))
    return model
