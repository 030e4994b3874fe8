"""Which runner a model gets: the compiled CPU step, the GPU's, or plain torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import structlog
import torch
from pagewire_core.errors import StartupError
from pagewire_core.machine import available_cpus, num_threads
from pagewire_kernels import ops
from pagewire_kernels.cpu import library as cpu_library
from pagewire_kernels.cpu.build import BuildError
from pagewire_kernels.cpu.cores import Cores

from pagewire_engine.cpu.kv_cache import PackedKVCache
from pagewire_engine.cpu.model import CpuModel
from pagewire_engine.cpu.runner import CpuRunner
from pagewire_engine.gpu.kv_cache import GpuKVCache, cache_dtype
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.rank_runner import GpuRankRunner
from pagewire_engine.gpu.runner import GpuRunner
from pagewire_engine.kv_cache import Allocate, KVCache, empty
from pagewire_engine.model_runner import Runner, TorchRunner
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.dense import DenseModel
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel.peers import ALONE, Peers
from pagewire_engine.quantization import SCHEMES
from pagewire_engine.weights import Checkpoint

log = structlog.get_logger(__name__)


def make_runner(
    config: ModelConfig,
    checkpoint: Checkpoint,
    options: EngineOptions,
    max_model_len: int,
    num_blocks: Callable[[], int],
) -> Runner:
    """Loads the weights and makes the pool. num_blocks is asked once the weights have their memory."""
    if _triton_can(config):
        return _gpu_runner(config, checkpoint, options, max_model_len, num_blocks)
    runner = make_rank_runner(config, checkpoint, options, max_model_len, num_blocks)
    assert not isinstance(runner, GpuRankRunner)
    return runner


def make_rank_runner(
    config: ModelConfig,
    checkpoint: Checkpoint,
    options: EngineOptions,
    max_model_len: int,
    num_blocks: Callable[[], int],
    peers: Peers = ALONE,
    allocate: Allocate = empty,
) -> CpuRunner | TorchRunner | GpuRankRunner:
    """As make_runner, for one of several ranks. config: of the whole model; allocate: makes the pool on a CPU."""
    if _triton_can(config):
        return _gpu_rank_runner(config, checkpoint, options, max_model_len, num_blocks, peers)
    if config.device.type == "cpu":
        _check_cpu_can(options)
        reason = _why_not_compiled(config, options)
        if not reason:
            return _cpu_runner(config, checkpoint, options, max_model_len, num_blocks, peers, allocate)
        log.warning("no compiled CPU step: plain torch, several times slower", reason=reason)
    if options.quantization:
        raise StartupError(f"--quantization {options.quantization} needs the compiled CPU step, or a GPU")
    if options.kv_cache_dtype != "auto":
        raise StartupError(
            f"--kv-cache-dtype {options.kv_cache_dtype} needs a CUDA device with Triton, and bfloat16 or float16 to "
            "compute in; leave it out"
        )
    with torch.inference_mode():
        model = DenseModel(config, checkpoint, max_model_len, peers)
    return TorchRunner(model, make_cache(peers.part.local(config), options, num_blocks(), allocate), peers)


def make_cache(config: ModelConfig, options: EngineOptions, num_blocks: int, allocate: Allocate = empty) -> KVCache:
    """The pool that make_rank_runner's runner has. config: of the rank's part of the model."""
    poison = options.poison_free_blocks
    if config.device.type == "cpu" and not _why_not_compiled(config, options):
        library = cpu_library.best()
        return PackedKVCache(library, config, num_blocks, options.block_size, poison=poison, allocate=allocate)
    return KVCache(config, num_blocks, options.block_size, poison=poison, allocate=allocate)


def _cpu_runner(
    config: ModelConfig,
    checkpoint: Checkpoint,
    options: EngineOptions,
    max_model_len: int,
    num_blocks: Callable[[], int],
    peers: Peers,
    allocate: Allocate,
) -> CpuRunner:
    torch.set_num_threads(1)  # small things are left for torch, and its waiting threads would spin beside the step's
    library = cpu_library.best()
    scheme = SCHEMES[options.quantization] if options.quantization else None
    with torch.inference_mode():
        model = CpuModel(library, config, checkpoint, max_model_len, scheme, peers)
    cache = make_cache(peers.part.local(config), options, num_blocks(), allocate)
    assert isinstance(cache, PackedKVCache)
    threads, cores = _cores(library, options)
    log.info("compiled CPU step", variant=library.pw_variant().decode(), threads=threads,
             weights=f"{model.weight_bytes / 2**20:.0f} MiB", quantization=options.quantization)  # fmt: skip
    return CpuRunner(library, model, cache, cores)


def _cores(library: ctypes.CDLL, options: EngineOptions) -> tuple[int, Cores]:
    """How many threads the step has, and where they run. Without the memory for it, no core is lent."""
    cpus = options.cpus or available_cpus()
    threads = options.threads or num_threads(cpus)
    if options.cpu_lending:
        others = sorted(set(available_cpus()) - set(cpus))
        try:
            return threads, Cores(library, threads, (*cpus, *others), Path(options.cpu_lending))
        except OSError as error:
            log.warning("this worker lends and borrows no cores", reason=str(error))
    return threads, Cores(library, threads, cpus if threads <= len(cpus) else ())


def _gpu_runner(
    config: ModelConfig,
    checkpoint: Checkpoint,
    options: EngineOptions,
    max_model_len: int,
    num_blocks: Callable[[], int],
) -> GpuRunner:
    with torch.inference_mode():
        scheme = SCHEMES[options.quantization] if options.quantization else None
        model = GpuModel(config, checkpoint, max_model_len, scheme)
    dtype = cache_dtype(options.kv_cache_dtype, config)
    cache = GpuKVCache(config, num_blocks(), options.block_size, dtype, poison=options.poison_free_blocks)
    cache.compile_copies()
    runner = GpuRunner(model, cache, options.max_num_seqs, max_model_len)
    if not options.enforce_eager:
        runner.capture_graphs(options.max_num_batched_tokens)
    return runner


def _gpu_rank_runner(
    config: ModelConfig,
    checkpoint: Checkpoint,
    options: EngineOptions,
    max_model_len: int,
    num_blocks: Callable[[], int],
    peers: Peers,
) -> GpuRankRunner:
    with torch.inference_mode():
        scheme = SCHEMES[options.quantization] if options.quantization else None
        model = GpuModel(config, checkpoint, max_model_len, scheme, peers)
    dtype = cache_dtype(options.kv_cache_dtype, config)
    cache = GpuKVCache(model.local, num_blocks(), options.block_size, dtype, poison=options.poison_free_blocks)
    cache.compile_copies()
    return GpuRankRunner(model, cache, peers)


def _triton_can(config: ModelConfig) -> bool:
    is_half = config.dtype in (torch.bfloat16, torch.float16)
    return config.device.type == "cuda" and ops.implementation("cuda").name == "triton" and is_half


def _check_cpu_can(options: EngineOptions) -> None:
    for flag, value in (("quantization", options.quantization), ("kv-cache-dtype", options.kv_cache_dtype)):
        if value and value.startswith("fp8"):
            raise StartupError(f"--{flag} {value} needs a CUDA device; on a CPU, --quantization is int8 or int4")
    missing = set(options.cpus) - set(available_cpus())
    if missing:
        raise StartupError(f"--cpus names cores that this process may not use: {', '.join(map(str, sorted(missing)))}")
    if options.cpu_lending and not (options.cpus and options.threads in (None, len(options.cpus))):
        raise StartupError("--cpu-lending needs --cpus, the cores that are this worker's own: as many as --threads")
    if options.cpus and (options.threads or 0) > len(options.cpus):
        raise StartupError(f"--cpus names {len(options.cpus)} cores for --threads {options.threads}; name one for each")


def _why_not_compiled(config: ModelConfig, options: EngineOptions) -> str | None:
    """What keeps the compiled step from running this model here; None: nothing."""
    if os.environ.get("PAGEWIRE_KERNELS") in ("torch", "triton"):
        return f"PAGEWIRE_KERNELS={os.environ['PAGEWIRE_KERNELS']}"
    if config.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 or bfloat16, not {config.dtype}"
    if config.head_dim % 16 or config.hidden_size % 16 or config.head_dim > cpu_library.MAX_HEAD_DIM:
        return "hidden size and head dimension must be multiples of 16"
    if options.block_size % cpu_library.PAGE:
        return f"--block-size {options.block_size} is no multiple of {cpu_library.PAGE}"
    try:
        cpu_library.best()
    except BuildError as error:
        return str(error)
    return None
