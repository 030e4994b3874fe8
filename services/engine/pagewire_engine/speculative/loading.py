"""From the flags to a proposer: a draft model is loaded as the target is, beside it."""

from __future__ import annotations

from dataclasses import replace

import structlog
import torch
from pagewire_core.errors import StartupError
from pagewire_core.machine import available_memory
from pagewire_core.model_dir import ModelDir, resolve_model

from pagewire_engine.loader import Loaded, load
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.options import EngineOptions
from pagewire_engine.resources import kv_bytes_per_token, max_positions, read_model_config
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.draft_model import DraftModel
from pagewire_engine.speculative.draft_proposer import DraftProposer
from pagewire_engine.speculative.ngram_proposer import NgramProposer
from pagewire_engine.speculative.proposer import SpeculativeProposer

log = structlog.get_logger(__name__)

_SHARE = 0.9  # of the memory that the draft model's weights leave: its steps need some too


def resolve_draft(config: SpeculativeConfig | None, download_dir: str | None = None) -> ModelDir | None:
    """The draft model's directory, if one is asked for. Raises StartupError."""
    if config is None or config.model is None:
        return None
    return resolve_model(config.model, config.revision, download_dir)


def load_proposer(
    config: SpeculativeConfig, target: Loaded, options: EngineOptions, draft: ModelDir | None = None
) -> SpeculativeProposer:
    """options: the target's. Raises StartupError, also for a draft model that does not fit the target."""
    max_model_len = target.config.max_model_len
    if draft is None:
        return NgramProposer(config, max_model_len)
    return DraftProposer(config, max_model_len, _load_draft(draft, target, options))


def _load_draft(draft: ModelDir, target: Loaded, options: EngineOptions) -> DraftModel:
    """A pool for as many tokens as the target's unless there is less memory."""
    shape, vocabulary = read_model_config(draft, options), target.runner.config.vocab_size
    if shape.vocab_size != vocabulary:
        raise StartupError(
            f"the draft model {draft.name} has a vocabulary of {shape.vocab_size} tokens and the target one of "
            f"{vocabulary}; take a draft model of the target's family"
        )
    max_model_len = min(target.config.max_model_len, max_positions(shape))
    per_token = kv_bytes_per_token(shape, options.kv_cache_dtype)
    wanted = target.config.num_blocks * target.config.block_size * per_token
    memory = min(wanted, int(_SHARE * (_free_bytes(shape) - draft.weight_bytes)))
    alone = replace(options, tensor_parallel_size=1, pipeline_parallel_size=1)  # too small to be worth dividing
    loaded = load(draft, replace(alone, max_model_len=max_model_len, kv_cache_memory_bytes=memory))
    log.info("draft model", model=draft.name, num_blocks=loaded.config.num_blocks, max_model_len=max_model_len)
    return DraftModel(loaded.runner, loaded.config)


def _free_bytes(shape: ModelConfig) -> int:
    if shape.device.type == "cpu":
        return available_memory()
    free: int = torch.cuda.mem_get_info()[0]
    return free
