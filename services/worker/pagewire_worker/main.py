"""The `pagewire-worker` process: one engine, and the services of its role."""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from functools import partial

import torch
import uvloop
from pagewire_core import faults, tracing
from pagewire_core.announced_host import announced_host
from pagewire_core.command_line import run_main
from pagewire_core.errors import StartupError
from pagewire_core.flags import WORKER_FLAGS
from pagewire_core.machine import num_threads
from pagewire_core.model_dir import resolve_model
from pagewire_core.startup import Timeline
from pagewire_core.telemetry import configure_logging
from pagewire_core.tls import tls_files, with_certificates
from pagewire_engine.loader import load
from pagewire_engine.options import EngineOptions
from pagewire_engine.speculative.config import read_speculative_config
from pagewire_engine.speculative.loading import load_proposer, resolve_draft
from pagewire_transfer.lanes import named_lanes

from pagewire_worker.worker import Worker


def main(began: float | None = None) -> None:
    """began: time.time() of the start, where it was before that of this process."""
    run_main(
        "pagewire-worker", partial(_run, began=began), WORKER_FLAGS, "Computes prompts, generates tokens, or both."
    )


def _run(args: argparse.Namespace, began: float | None) -> None:
    timeline = Timeline(began)
    timeline.mark("imports")
    faults.arm(os.environ.get(faults.VARIABLE))
    if not args.enable_chunked_prefill:
        raise StartupError("--no-enable-chunked-prefill: prompts are always computed in chunks; leave the flag out")
    configure_logging(f"worker-{args.role}", args.log_format, args.log_level)
    if not args.model:
        raise StartupError("no model: give --model a directory or a Hub id")
    tls = tls_files(args.tls_cert, args.tls_key, args.tls_ca)
    args.redis_url = with_certificates(args.redis_url, tls)
    # What cannot work is told before the model is loaded, which may take minutes.
    named_lanes(args.lanes, tls is not None)
    host = announced_host(args.host, args.redis_url)
    torch.set_num_threads(args.threads or min(torch.get_num_threads(), num_threads(args.cpus)))
    torch.set_num_interop_threads(1)
    model = resolve_model(args.model, args.revision, args.download_dir)
    options = _options(args)
    # A prefill worker makes one token of a sequence: there is nothing to speculate on.
    speculation = read_speculative_config(args.speculative_config, args.speculate) if args.role != "prefill" else None
    draft = resolve_draft(speculation, args.download_dir)
    try:
        loaded = load(model, options, draft)
        proposer = load_proposer(speculation, loaded, options, draft) if speculation else None
        timeline.mark("model")
        uvloop.run(Worker(args, host, loaded, proposer, uuid.uuid4().hex, timeline, tls).run())
    except StartupError as error:
        # The interpreter's own end would end threads in the middle of compiled code, which aborts the process.
        sys.stderr.write(f"pagewire-worker: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    tracing.close()
    # Lane threads may still sit in a blocking receive of a peer that died; they hold nothing that matters.
    os._exit(0)


def _options(args: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device=args.device,
        tensor_parallel_size=args.tensor_parallel_size,
        pipeline_parallel_size=args.pipeline_parallel_size,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        kv_cache_dtype=args.kv_cache_dtype,
        enforce_eager=args.enforce_eager,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_prefill_delay_ms=args.max_prefill_delay_ms,
        enable_prefix_caching=args.enable_prefix_caching,
        threads=args.threads,
        cpus=args.cpus,
        cpu_lending=args.cpu_lending,
        # For tests: stale reads of free blocks give NaN instead of somebody else's KV.
        poison_free_blocks=os.environ.get("PAGEWIRE_POISON_FREE_BLOCKS") == "1",
    )


if __name__ == "__main__":
    main()
