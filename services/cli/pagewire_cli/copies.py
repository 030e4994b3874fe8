"""How many copies of the weights a machine has room for, where nobody said how many workers it is to have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from pagewire_core.machine import available_memory
from pagewire_core.model_dir import ModelDir

from pagewire_cli import gpus

_SHARE = 0.5  # of the memory that is free, for two copies; the rest is for KV and what else runs here


def why_one(args: argparse.Namespace, model: ModelDir, environ: Mapping[str, str] = os.environ) -> str | None:
    """Why one copy of the weights, in one worker for both stages, is better here: a sentence. None: two are fine."""
    seen = gpus.seen(args.device, environ)
    if seen:
        needed = 2 * args.tensor_parallel_size * args.pipeline_parallel_size
        return f"two workers want {needed} GPUs and there are {len(seen)}" if len(seen) < needed else None
    copy, free = model.loaded_bytes(_itemsize(args, model), args.quantization), available_memory()
    if 2 * copy <= _SHARE * free:
        return None
    return f"two copies of the weights would take {2 * copy / 2**30:.1f} of {free / 2**30:.1f} GiB of memory"


def _itemsize(args: argparse.Namespace, model: ModelDir) -> int:
    stored = str(model.config.get("dtype") or model.config.get("torch_dtype"))
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and stored.endswith("bfloat16"))
    return 2 if half else 4  # float16 is computed in float32
