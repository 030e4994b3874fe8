"""From a model directory and flags to an engine: device, dtype, weights, pool size."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import structlog
import torch
from pagewire_core.block_hash import fingerprint
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import ModelDir

from pagewire_engine.config import DTYPES, EngineConfig
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.model_runner import ModelRunner
from pagewire_engine.models.config import ModelConfig, read_config
from pagewire_engine.models.dense import DenseModel
from pagewire_engine.weights import Checkpoint

log = structlog.get_logger(__name__)

DEFAULT_CPU_KV_BYTES = 4 << 30  # a KV pool that fills all of a laptop's memory helps nobody


@dataclass(frozen=True)
class EngineOptions:
    """The engine's flags, as given."""

    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    poison_free_blocks: bool = False  # tests: a free block holds NaN, so that any stale read shows


@dataclass(frozen=True)
class Loaded:
    """A model ready to run."""

    runner: ModelRunner
    config: EngineConfig
    fingerprint: bytes
    model_digest: bytes


def load(model: ModelDir, options: EngineOptions) -> Loaded:
    """Loads the weights and sizes the pool. Raises StartupError with a remedy for everything a user can mend."""
    device = _device(options.device)
    with torch.inference_mode():
        dtype = _dtype(options.dtype, model, device)
        config = read_config(model.config, dtype, device)
        max_model_len = _max_model_len(options, config)
        _check_memory(model, device)
        with Checkpoint(model.path, dtype, device) as checkpoint:
            dense = DenseModel(config, checkpoint, max_model_len)
    num_blocks = _num_blocks(options, config, max_model_len)
    # Not an inference tensor: transfers write to it from threads outside inference mode.
    cache = KVCache(config, num_blocks, options.block_size, poison=options.poison_free_blocks)
    log.info("model loaded", dtype=str(dtype), device=str(device), num_gpu_blocks=num_blocks,
             max_model_len=max_model_len, kv_bytes_per_token=cache.bytes_per_token)  # fmt: skip
    engine = EngineConfig(
        max_model_len=max_model_len,
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enable_prefix_caching=options.enable_prefix_caching,
    )
    digest = model.digest()
    return Loaded(ModelRunner(dense, cache), engine, _fingerprint(config, digest, max_model_len), digest)


def _fingerprint(config: ModelConfig, digest: bytes, max_model_len: int) -> bytes:
    rope = dict(config.rope)
    if rope["rope_type"] == "dynamic":  # its frequencies depend on the served length
        rope["max_model_len"] = max_model_len
    return fingerprint(
        {
            "model": digest.hex(),
            "kv_dtype": str(config.dtype),
            "rope": rope,
            "num_layers": config.num_layers,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "windows": config.windows,
        }
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError(
            "--device cuda: torch sees no CUDA device; install a CUDA build of torch or use --device cpu"
        )
    return torch.device(name)


def _dtype(name: str, model: ModelDir, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    stored = str(model.config.get("torch_dtype") or model.config.get("dtype") or "float32").removeprefix("torch.")
    dtype = DTYPES.get(stored, torch.float32)
    if dtype == torch.float16 and device.type == "cpu":
        log.warning("float16 arithmetic is very slow on a CPU: computing in float32 (--dtype bfloat16 halves memory)")
        return torch.float32
    return dtype


def _max_model_len(options: EngineOptions, config: ModelConfig) -> int:
    """The model's own length unless told otherwise; a scaled RoPE may be stretched by its factor."""
    trained = config.rope.get("original_max_position_embeddings") or config.max_position_embeddings
    limit = max(config.max_position_embeddings, int(trained * config.rope.get("factor", 1.0)))
    asked = options.max_model_len or config.max_position_embeddings
    if asked > limit:
        raise StartupError(f"--max-model-len {asked} is more than the {limit} positions the model was made for")
    return asked


def _check_memory(model: ModelDir, device: torch.device) -> None:
    """Fails before the system's memory does."""
    needed = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
    if needed > free:
        raise StartupError(
            f"the weights take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
            "use a smaller model or a machine with more memory"
        )


def _num_blocks(options: EngineOptions, config: ModelConfig, max_model_len: int) -> int:
    """Blocks that fit the memory asked for; at least one sequence of max_model_len must fit."""
    element = torch.empty((), dtype=config.dtype).element_size()
    per_token = config.num_layers * 2 * config.num_kv_heads * config.head_dim * element
    memory = options.kv_cache_memory_bytes or _default_kv_bytes(options, config)
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
