"""The `pagewire-worker` process: one engine, and the services of its role."""

from __future__ import annotations

import argparse
import os
import time
import uuid

import structlog
import torch
import uvloop
from pagewire_core.errors import StartupError
from pagewire_core.flags import WORKER_FLAGS, run_main
from pagewire_core.model_dir import resolve_model
from pagewire_core.telemetry import configure_logging
from pagewire_engine.loader import EngineOptions, load

from pagewire_worker.worker import Worker

log = structlog.get_logger(__name__)


def main() -> None:
    run_main("pagewire-worker", _run, WORKER_FLAGS, "Computes prompts, generates tokens, or both.")


def _run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    if not args.enable_chunked_prefill:
        raise StartupError("--no-enable-chunked-prefill: prompts are always computed in chunks; leave the flag out")
    configure_logging(f"worker-{args.role}", args.log_format, args.log_level)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    model = resolve_model(args.model, args.revision, args.download_dir)
    loaded = load(
        model,
        EngineOptions(
            dtype=args.dtype,
            device=args.device,
            max_model_len=args.max_model_len,
            block_size=args.block_size,
            gpu_memory_utilization=args.gpu_memory_utilization,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=args.enable_prefix_caching,
            # For tests: stale reads of free blocks give NaN instead of somebody else's KV.
            poison_free_blocks=os.environ.get("PAGEWIRE_POISON_FREE_BLOCKS") == "1",
        ),
    )
    log.info("engine ready", seconds=round(time.monotonic() - started, 2))
    worker = Worker(args, loaded, instance=uuid.uuid4().hex)
    uvloop.run(worker.run())
    # Lane threads may still sit in a blocking receive of a peer that died; they hold nothing that matters.
    os._exit(0)


if __name__ == "__main__":
    main()
