"""GpuRunners that compute on CPU tensors: everything but the launches and the graphs is the real thing."""

from __future__ import annotations

from pathlib import Path

import torch
from pagewire_core.model_dir import resolve_model
from pagewire_engine.config import EngineConfig
from pagewire_engine.gpu.kv_cache import GpuKVCache
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.runner import GpuRunner
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.model_runner import TorchRunner
from pagewire_engine.models.config import read_config
from pagewire_engine.models.dense import DenseModel
from pagewire_engine.quantization import SCHEMES
from pagewire_engine.weights import Checkpoint

torch.set_num_threads(1)  # these models are too small to divide: threads would only wait for each other

CPU = torch.device("cpu")
LIMITS = EngineConfig(max_model_len=256, block_size=16, num_blocks=64, max_num_seqs=12, max_num_batched_tokens=40)


def make_gpu_runner(
    path: Path,
    limits: EngineConfig = LIMITS,
    *,
    scheme: str | None = None,
    kv_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> GpuRunner:
    """Free pages are poisoned."""
    with torch.inference_mode():
        config = read_config(resolve_model(str(path)).config, dtype, CPU)
        with Checkpoint(path, dtype, CPU) as checkpoint:
            model = GpuModel(config, checkpoint, limits.max_model_len, SCHEMES[scheme] if scheme else None)
    cache = GpuKVCache(config, limits.num_blocks, limits.block_size, kv_dtype or dtype, poison=True)
    return GpuRunner(model, cache, limits.max_num_seqs, limits.max_model_len)


def make_torch_runner(path: Path, limits: EngineConfig = LIMITS) -> TorchRunner:
    """The reference, in float32."""
    with torch.inference_mode():
        config = read_config(resolve_model(str(path)).config, torch.float32, CPU)
        with Checkpoint(path, torch.float32, CPU) as checkpoint:
            model = DenseModel(config, checkpoint, limits.max_model_len)
    return TorchRunner(model, KVCache(config, limits.num_blocks, limits.block_size, poison=True))
