"""From a model directory and flags to the ranks of a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from pagewire_core.errors import StartupError
from pagewire_core.machine import available_cpus, num_threads
from pagewire_core.model_dir import ModelDir
from torch.distributed import Store

from pagewire_engine.kv_cache import Allocate, empty
from pagewire_engine.model_runner import RankRunner
from pagewire_engine.models.config import ModelConfig
from pagewire_engine.models.part import Part
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel.peers import GroupPeers
from pagewire_engine.parallel.pools import JoinedKVCache, Pool, RankPool, SharedMemory
from pagewire_engine.parallel.remote_pool import RemotePool
from pagewire_engine.parallel.runner import ParallelRunner
from pagewire_engine.parallel.team import Team
from pagewire_engine.resources import Space, read_model_config
from pagewire_engine.runners import make_cache, make_rank_runner
from pagewire_engine.weights import Checkpoint


def load_rank(
    model: ModelDir,
    options: EngineOptions,
    part: Part,
    store: Store,
    agree: Callable[[int], int],
    allocate: Allocate = empty,
    draft: ModelDir | None = None,
) -> RankRunner:
    """One rank's part of a worker. store: of the process groups; agree: the ranks' blocks -> those of all."""
    options = _rank_options(options, part)
    config = _rank_config(model, options, part)
    part.check(config)
    if config.device.type == "cuda":
        torch.cuda.set_device(config.device)
    elif options.threads:
        torch.set_num_threads(options.threads)
    peers = GroupPeers(part, store, config.device)
    space = Space(model, config, options, draft, part)
    with Checkpoint(model.path, config.dtype, config.device) as checkpoint:
        return make_rank_runner(
            config, checkpoint, options, space.max_model_len, lambda: agree(space.num_blocks()), peers, allocate
        )


def load_team(model: ModelDir, options: EngineOptions, draft: ModelDir | None) -> ParallelRunner:
    """Rank 0 here, the others in processes of their own; their pools are mapped here."""
    part = _part(0, options)
    part.check(read_model_config(model, options))
    team = Team(model.path, options)

    def agree(num_blocks: int) -> int:
        least = min([num_blocks, *(int(team.receive(rank)["num_blocks"]) for rank in team.ranks)])
        team.send({"num_blocks": np.array(least)})
        return least

    runner = load_rank(model, options, part, team.store, agree, draft=draft)
    pools = [RankPool.of(runner.cache, part, runner.config)]
    for other in (_part(rank, options) for rank in team.ranks):
        config, cache = other.local(runner.config), runner.cache
        if config.device.type == "cpu":
            memory = SharedMemory(team.receive_file(other.index))
            pool: Pool = make_cache(config, options, cache.num_blocks, memory.allocate)
            memory.close()
        else:
            pool = RemotePool(team.pages(other.index), config, cache, poison=options.poison_free_blocks)
        pools.append(RankPool.of(pool, other, runner.config))
    return ParallelRunner(runner, JoinedKVCache(runner.config, pools), part, team)


def _part(rank: int, options: EngineOptions) -> Part:
    return Part.of(rank, options.tensor_parallel_size, options.pipeline_parallel_size)


def _rank_options(options: EngineOptions, part: Part) -> EngineOptions:
    """The rank's share of the worker's cores, which it lends to nobody: ranks wait for each other in every layer.

    Where there are fewer cores than ranks, one thread each, anywhere.
    """
    cpus, ranks = options.cpus or available_cpus(), part.ranks * part.stages
    threads = max(1, (options.threads or num_threads(cpus)) // ranks)
    own = cpus[len(cpus) * part.index // ranks : len(cpus) * (part.index + 1) // ranks]
    return replace(options, threads=threads, cpus=own if len(own) >= threads else (), cpu_lending=None)


def _rank_config(model: ModelDir, options: EngineOptions, part: Part) -> ModelConfig:
    """As read_model_config; on CUDA, rank r has device r."""
    config = read_model_config(model, options)
    if config.device.type == "cpu":
        return config
    if torch.cuda.device_count() < options.num_ranks:
        raise StartupError(
            f"--tensor-parallel-size {options.tensor_parallel_size} times --pipeline-parallel-size "
            f"{options.pipeline_parallel_size} needs {options.num_ranks} GPUs, torch sees {torch.cuda.device_count()}"
        )
    return replace(config, device=torch.device("cuda", part.index))
