"""What a model takes and may take on this machine: device, dtype, length, blocks of KV."""

from __future__ import annotations

from dataclasses import dataclass

import structlog
import torch
from pagewire_core.errors import StartupError
from pagewire_core.machine import available_memory
from pagewire_core.model_dir import ModelDir, read_json

from pagewire_engine.config import DTYPES
from pagewire_engine.gpu.kv_cache import cache_dtype
from pagewire_engine.models.config import ModelConfig, read_config
from pagewire_engine.models.part import WHOLE, Part
from pagewire_engine.options import EngineOptions

log = structlog.get_logger(__name__)

DEFAULT_CPU_KV_BYTES = 4 << 30  # a KV pool that fills all of a laptop's memory helps nobody


def read_model_config(model: ModelDir, options: EngineOptions) -> ModelConfig:
    """The model's shape, with the dtype and on the device that it will be loaded to. Raises StartupError."""
    device = _device(options.device)
    _check_pooling(model)
    return read_config(model.config, _dtype(options.dtype, model, device), device)


def _check_pooling(model: ModelDir) -> None:
    """Raises StartupError for an embedding model, by sentence-transformers' files, of other vectors than ours."""
    pooling = read_json(model.path / "1_Pooling" / "config.json", {})
    modes = {mode.removeprefix("pooling_mode_") for mode, used in pooling.items() if used and "pooling_mode_" in mode}
    modes |= {pooling.get("pooling_mode", "lasttoken")}  # newer files
    if others := modes - {"lasttoken"}:
        raise StartupError(
            f"{model.path} makes its vectors by pooling {', '.join(others)}; only lasttoken is supported"
        )


def kv_bytes_per_token(config: ModelConfig, kv_cache_dtype: str = "auto") -> int:
    itemsize = cache_dtype(kv_cache_dtype, config).itemsize
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * itemsize


def max_positions(config: ModelConfig) -> int:
    """The longest sequence that the model was made for; a scaled RoPE may be stretched by its factor."""
    rope = config.rope
    trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = 1.0 if rope["rope_type"] == "default" else rope.get("factor") or 1.0
    return max(config.max_position_embeddings, int(trained * factor))


def _draft_part(config: ModelConfig, draft: ModelDir, options: EngineOptions) -> tuple[int, float]:
    """Bytes of a draft model's weights, and the share of the KV memory that is left to the target."""
    per_token = kv_bytes_per_token(config, options.kv_cache_dtype)
    drafts = kv_bytes_per_token(read_model_config(draft, options), options.kv_cache_dtype)
    return draft.weight_bytes, per_token / (per_token + drafts)


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


def model_len(options: EngineOptions, config: ModelConfig) -> int:
    """The model's own length unless told otherwise."""
    limit = max_positions(config)
    asked = options.max_model_len or config.max_position_embeddings
    if asked > limit:
        raise StartupError(f"--max-model-len {asked} is more than the {limit} positions the model was made for")
    return asked


@dataclass(frozen=True)
class Space:
    """Memory for weights and pool of one rank."""

    model: ModelDir
    config: ModelConfig
    options: EngineOptions
    draft: ModelDir | None = None  # that will be loaded beside it
    part: Part = WHOLE

    def __post_init__(self) -> None:
        """Fails before the system's memory does."""
        cpu, ranks = self.config.device.type == "cpu", self.part.ranks * self.part.stages
        loaded = self.model.loaded_bytes(self.config.dtype.itemsize, self.options.quantization)
        needed = loaded // (1 if cpu else ranks)
        if needed > (free := self._free_bytes()):
            raise StartupError(
                f"the weights take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
                "use --quantization int4, a smaller model, or a machine or a container's limit with more memory"
            )

    @property
    def max_model_len(self) -> int:
        return model_len(self.options, self.config)

    def num_blocks(self) -> int:
        """Blocks that fit the memory asked for; at least one sequence of max_model_len must fit.

        Of memory that is not asked for by size, a draft model takes its part.
        """
        options, per_token = self.options, self._bytes_per_token()
        reserved, share = _draft_part(self.config, self.draft, options) if self.draft else (0, 1.0)
        memory = options.kv_cache_memory_bytes or int(max(self._default_bytes() - reserved, 0) * share)
        if options.kv_cache_memory_bytes and memory > (free := self._free_bytes()):
            raise StartupError(
                f"--kv-cache-memory-bytes is {memory / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
                "lower it"
            )
        num_blocks = memory // (per_token * options.block_size)
        if num_blocks * options.block_size < self.max_model_len:
            raise StartupError(
                f"a sequence of --max-model-len {self.max_model_len} takes "
                f"{self.max_model_len * per_token / 2**20:.1f} MiB of KV, the pool has {memory / 2**20:.1f} MiB; "
                "lower --max-model-len or raise --kv-cache-memory-bytes"
            )
        return num_blocks

    def _free_bytes(self) -> int:
        device = self.config.device
        return available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]

    def _bytes_per_token(self) -> int:
        """Of this rank on a GPU of its own; of all ranks in the memory that they share on a CPU."""
        part = self.part
        if self.config.device.type == "cpu":
            parts = [Part.of(i, part.ranks, part.stages) for i in range(part.ranks * part.stages)]
        else:
            parts = [part]
        return sum(kv_bytes_per_token(p.local(self.config), self.options.kv_cache_dtype) for p in parts)

    def _default_bytes(self) -> int:
        config, options = self.config, self.options
        if config.device.type == "cpu":
            available = int(available_memory() * options.gpu_memory_utilization)
            return min(available, DEFAULT_CPU_KV_BYTES)
        free, total = torch.cuda.mem_get_info(config.device)
        # The share is of each process: several workers on one GPU have a part of --gpu-memory-utilization each.
        own = int(total * options.gpu_memory_utilization) - torch.cuda.memory_reserved(config.device)
        # Activations of the largest step: a few copies of the widest row in float32, and the logits.
        widest = max(4 * config.intermediate_size, 8 * config.hidden_size)
        step = 4 * (options.max_num_batched_tokens * widest + options.max_num_seqs * config.vocab_size * 4)
        return max(min(free, own) - step, 0)
