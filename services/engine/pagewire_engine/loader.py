"""From a model directory and flags to an engine's parts."""

from __future__ import annotations

from dataclasses import dataclass

import structlog
import torch
from pagewire_core.block_hash import fingerprint
from pagewire_core.errors import StartupError
from pagewire_core.grammar import Vocabulary
from pagewire_core.model_dir import ModelDir, locate

from pagewire_engine.config import EngineConfig
from pagewire_engine.constraint import Constraints
from pagewire_engine.model_runner import Runner
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel.loading import load_team
from pagewire_engine.resources import Space, model_len, read_model_config
from pagewire_engine.runners import make_runner
from pagewire_engine.weights import Checkpoint

log = structlog.get_logger(__name__)

_ENOUGH_ON_A_CPU = 128  # tokens: as many as the compiled step multiplies with one pass through the weights


@dataclass(frozen=True)
class Loaded:
    """A model ready to run."""

    runner: Runner
    config: EngineConfig
    fingerprint: bytes
    model_digest: bytes
    constraints: Constraints | None  # None: the model has no tokenizer that grammars could be about


def load(model: ModelDir, options: EngineOptions, draft: ModelDir | None = None) -> Loaded:
    """Loads the weights and sizes the pool. Raises StartupError with a remedy for everything a user can mend.

    draft: a model that will be loaded beside this one, with KV for as many tokens; memory is left for it.
    """
    if options.num_ranks > 1:
        runner: Runner = load_team(model, options, draft)
    else:
        space = Space(model, read_model_config(model, options), options, draft)
        config = space.config
        with Checkpoint(model.path, config.dtype, config.device) as checkpoint:
            runner = make_runner(config, checkpoint, options, space.max_model_len, space.num_blocks)
    cache, config = runner.cache, runner.config
    num_blocks, max_model_len = cache.num_blocks, model_len(options, config)
    log.info("model loaded", dtype=str(config.dtype), device=str(config.device), num_gpu_blocks=num_blocks,
             max_model_len=max_model_len, kv_bytes_per_token=cache.bytes_per_token)  # fmt: skip
    engine = EngineConfig(
        max_model_len=max_model_len,
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_prefill_delay_ms=options.max_prefill_delay_ms,
        enable_prefix_caching=options.enable_prefix_caching,
        enough_prompt_tokens=_ENOUGH_ON_A_CPU if config.device.type == "cpu" else options.max_num_batched_tokens,
        vocab_size=config.vocab_size,
        attention_work=config.attention_work,
    )
    digest = model.digest()
    identity = _fingerprint(config, digest, max_model_len, cache.dtype, options.quantization)
    return Loaded(runner, engine, identity, digest, _constraints(model, options, config.vocab_size))


def _constraints(model: ModelDir, options: EngineOptions, vocab_size: int) -> Constraints | None:
    path = locate(options.tokenizer, None, None) if options.tokenizer else model.path
    try:
        return Constraints(Vocabulary(path, vocab_size, model.eos_token_ids))
    except StartupError as error:
        log.warning("no structured output", reason=str(error))
        return None


def _fingerprint(
    config: ModelConfig, digest: bytes, max_model_len: int, kv_dtype: torch.dtype, quantization: str | None
) -> bytes:
    rope = dict(config.rope)
    if rope["rope_type"] == "dynamic":  # its frequencies depend on the served length
        rope["max_model_len"] = max_model_len
    return fingerprint(
        {
            "model": digest.hex(),
            "kv_dtype": str(kv_dtype),
            "quantization": quantization or "",  # other weights write other keys and values
            "rope": rope,
            "num_layers": config.num_layers,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "windows": config.windows,
        }
    )
