"""The GPU's step on several ranks, computed on CPU tensors: everything but the launches and NCCL is the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import OPTIONS, Run, run_all
from gpu_runners import CPU, LIMITS, make_gpu_runner
from pagewire_core.model_dir import resolve_model
from pagewire_engine.engine import Engine
from pagewire_engine.gpu.kv_cache import GpuKVCache
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.rank_runner import GpuRankRunner
from pagewire_engine.models.config import read_config
from pagewire_engine.models.part import Part
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel.peers import GroupPeers
from pagewire_engine.quantization import SCHEMES
from pagewire_engine.weights import Checkpoint
from pagewire_transfer.relay_store import RelayStore
from rank_threads import engine_of
from tiny_models import make_model

FP8 = torch.float8_e4m3fn


def make_rank(path: Path, part: Part, store: RelayStore, scheme: str | None, kv_dtype: torch.dtype) -> GpuRankRunner:
    config, peers = read_config(resolve_model(str(path)).config, torch.float32, CPU), GroupPeers(part, store, CPU)
    with torch.inference_mode(), Checkpoint(path, torch.float32, CPU) as checkpoint:
        model = GpuModel(config, checkpoint, LIMITS.max_model_len, SCHEMES[scheme] if scheme else None, peers)
    cache = GpuKVCache(model.local, LIMITS.num_blocks, LIMITS.block_size, kv_dtype, poison=True)
    return GpuRankRunner(model, cache, peers)


def runs() -> list[Run]:
    return [
        Run([(7 * i) % 300 + 5 for i in range(90)], logprobs=2),
        Run([40, 41, 42], n=3, temperature=1.0, seed=4, top_p=0.9),
        Run(list(range(60, 110)), temperature=0.7, seed=1, repetition_penalty=1.3, logit_bias={40: 3.0}),
    ]


@pytest.mark.parametrize(
    ("architecture", "tp", "pp", "scheme", "kv_dtype"),
    [
        ("llama", 4, 1, None, torch.float32),
        ("qwen3", 2, 2, None, torch.float32),
        ("qwen2", 2, 1, "int8", torch.float32),
        ("mistral", 2, 1, None, FP8),
    ],
)
def test_the_tokens_are_those_of_one_gpu(
    architecture: str, tp: int, pp: int, scheme: str | None, kv_dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model(tmp_path, architecture)
    alone, together = runs(), runs()
    run_all(Engine(make_gpu_runner(model, scheme=scheme, kv_dtype=kv_dtype), LIMITS), *alone)
    options = EngineOptions(**OPTIONS, max_num_seqs=LIMITS.max_num_seqs)
    with engine_of(lambda part, store: make_rank(model, part, store, scheme, kv_dtype), tp, pp, options) as engine:
        run_all(engine, *together)
    for one, many in zip(alone, together, strict=True):
        assert [many.tokens(i) for i in range(many.request.n)] == [one.tokens(i) for i in range(one.request.n)]
