"""From a model directory and flags to an engine: device, dtype, weights, pool size."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import structlog
import torch
from pagewire_core.block_hash import fingerprint
from pagewire_core.errors import StartupError
from pagewire_core.grammar import Vocabulary
from pagewire_core.model_dir import ModelDir, locate

from pagewire_engine.config import DTYPES, EngineConfig
from pagewire_engine.constraint import Constraints
from pagewire_engine.gpu.kv_cache import cache_dtype
from pagewire_engine.model_runner import Runner
from pagewire_engine.models.config import ModelConfig, read_config
from pagewire_engine.options import EngineOptions
from pagewire_engine.runners import make_runner
from pagewire_engine.weights import Checkpoint

log = structlog.get_logger(__name__)

DEFAULT_CPU_KV_BYTES = 4 << 30  # a KV pool that fills all of a laptop's memory helps nobody


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
    config = read_model_config(model, options)
    max_model_len = _max_model_len(options, config)
    _check_memory(model, config.device)

    def num_blocks_that_fit() -> int:
        reserved, share = _draft_part(config, draft, options) if draft else (0, 1.0)
        return _num_blocks(options, config, max_model_len, reserved, share)

    with Checkpoint(model.path, config.dtype, config.device) as checkpoint:
        runner = make_runner(config, checkpoint, options, max_model_len, num_blocks_that_fit)
    cache, num_blocks = runner.cache, runner.cache.num_blocks
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
    )
    digest = model.digest()
    identity = _fingerprint(config, digest, max_model_len, cache.kv.dtype, options.quantization)
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


def read_model_config(model: ModelDir, options: EngineOptions) -> ModelConfig:
    """The model's shape, with the dtype and on the device that it will be loaded to. Raises StartupError."""
    device = _device(options.device)
    return read_config(model.config, _dtype(options.dtype, model, device), device)


def kv_bytes_per_token(config: ModelConfig, kv_cache_dtype: str = "auto") -> int:
    itemsize = cache_dtype(kv_cache_dtype, config).itemsize
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * itemsize


def max_positions(config: ModelConfig) -> int:
    """The longest sequence that the model was made for; a scaled RoPE may be stretched by its factor."""
    trained = config.rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return max(config.max_position_embeddings, int(trained * config.rope.get("factor", 1.0)))


def _draft_part(config: ModelConfig, draft: ModelDir, options: EngineOptions) -> tuple[int, float]:
    """Bytes of a draft model's weights, and the share of the KV memory that is left to the target."""
    per_token = kv_bytes_per_token(config, options.kv_cache_dtype)
    drafts = kv_bytes_per_token(read_model_config(draft, options), options.kv_cache_dtype)
    return weight_bytes(draft), per_token / (per_token + drafts)


def weight_bytes(model: ModelDir) -> int:
    return sum(file.stat().st_size for file in model.path.glob("*.safetensors"))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError(
            "--device cuda: torch sees no CUDA device; install a CUDA build of torch or use --device cpu"
        )
    return torch.device(name)


def _dtype(name: str, model: ModelDir, device: torch.device) -> torch.dtype:
    stored = str(model.config.get("torch_dtype") or model.config.get("dtype") or "float32").removeprefix("torch.")
    dtype = DTYPES.get(stored if name == "auto" else name, torch.float32)
    if dtype == torch.float16 and device.type == "cpu":
        log.warning("float16 arithmetic is very slow on a CPU: computing in float32 (--dtype bfloat16 halves memory)")
        return torch.float32
    return dtype


def _max_model_len(options: EngineOptions, config: ModelConfig) -> int:
    """The model's own length unless told otherwise."""
    limit = max_positions(config)
    asked = options.max_model_len or config.max_position_embeddings
    if asked > limit:
        raise StartupError(f"--max-model-len {asked} is more than the {limit} positions the model was made for")
    return asked


def _check_memory(model: ModelDir, device: torch.device) -> None:
    """Fails before the system's memory does."""
    needed = weight_bytes(model)
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
    if needed > free:
        raise StartupError(
            f"the weights take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
            "use a smaller model or a machine with more memory"
        )


def _num_blocks(
    options: EngineOptions, config: ModelConfig, max_model_len: int, reserved: int = 0, share: float = 1.0
) -> int:
    """Blocks that fit the memory asked for; at least one sequence of max_model_len must fit.

    Of memory that is not asked for by size, `reserved` bytes are somebody else's and `share` of the rest is ours.
    """
    per_token = kv_bytes_per_token(config, options.kv_cache_dtype)
    memory = options.kv_cache_memory_bytes or int(max(_default_kv_bytes(options, config) - reserved, 0) * share)
    num_blocks = memory // (per_token * options.block_size)
    if num_blocks * options.block_size < max_model_len:
        raise StartupError(
            f"a sequence of --max-model-len {max_model_len} takes {max_model_len * per_token / 2**20:.1f} MiB of KV, "
            f"the pool has {memory / 2**20:.1f} MiB; lower --max-model-len or raise --kv-cache-memory-bytes"
        )
    return num_blocks


def _default_kv_bytes(options: EngineOptions, config: ModelConfig) -> int:
    if config.device.type == "cpu":
        available = int(psutil.virtual_memory().available * options.gpu_memory_utilization)
        return min(available, DEFAULT_CPU_KV_BYTES)
    free, total = torch.cuda.mem_get_info()
    # Activations of the largest step: a few copies of the widest row in float32, and the logits.
    widest = max(4 * config.intermediate_size, 8 * config.hidden_size)
    step = 4 * (options.max_num_batched_tokens * widest + options.max_num_seqs * config.vocab_size * 4)
    return max(int(free - (1 - options.gpu_memory_utilization) * total) - step, 0)
