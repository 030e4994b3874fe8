"""The GPU engine on one machine in one call: right, and how near to what the device can do.

    PYTHONPATH=protos:kernels:services/core:services/transfer:services/engine:benchmarks \\
        python benchmarks/gpu.py --out gpu.json

Needs torch, triton and what the engine imports (numpy, structlog, llguidance, protobuf and the like); no files, no
network: a model of Llama 3 8B's shape is made of random weights on the device. Parts, each reported even if another
fails, the JSON rewritten after each:

    kernels       every kernel against its reference, and its time against its floor
    agreement     log probabilities against transformers' in float32 on the same weights, if it can be imported
    exactness     the same tokens with and without CUDA graphs, overlapping steps, overlapping kernels
    load          requests that come at once; the decode step against reading weights and KV once
    prefill       one long prompt against the rate of a large matrix product
    profile       which kernels a decode step and a prompt spend the device's time in
    transformers  its continuous batching and ours on the same load
    variants      the load with int8, int4 and fp8 weights and an fp8 cache

`--tiny --device cpu` runs all of it on a toy model, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import gpu_kernels
import torch
from pagewire_bench import gpu_transformers
from pagewire_bench.gpu_load import Client, complete, prefill_seconds, random_prompts, run_load
from pagewire_bench.gpu_model import LLAMA_3_8B, TINY, limits_for, make_engine, model_config
from pagewire_bench.gpu_profile import decode_profile, prefill_profile
from pagewire_engine.config import EngineConfig
from pagewire_engine.engine import Engine
from pagewire_engine.gpu.model import GpuModel
from pagewire_kernels import dependent_launch

Result = dict[str, Any]


class Bench:
    """What the parts share: the model's shape, the load's sizes and the device's limits."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.shape = TINY if tiny else LLAMA_3_8B
        self.config = model_config(self.shape, device)
        self.prompt, self.output = (16, 6) if tiny else (512, 256)
        self.concurrency = (1, 2, 4) if tiny else (1, 8, 32, 128, 256)
        self.usual = 4 if tiny else 128  # sequences, where only one number of them is tried
        self.prefills = (32, 64) if tiny else (64, 512, 2048, 8000)
        self.bandwidth, self.flops = (1.0, 1.0) if device.type == "cpu" else _limits()

    def limits(self, num_seqs: int) -> EngineConfig:
        return limits_for(num_seqs, self.prompt + self.output)

    def load(self, engine: Engine, model: GpuModel, num_seqs: int) -> Result:
        run_load(engine, min(num_seqs, 4), self.prompt, 2, self.config.vocab_size)  # compiles what is still to compile
        outcome = run_load(engine, num_seqs, self.prompt, self.output, self.config.vocab_size)
        context = num_seqs * (self.prompt + self.output / 2) * engine.runner.cache.bytes_per_token
        floor_ms = 1e3 * (model.num_weight_bytes + context) / self.bandwidth
        decoding = 1e3 * num_seqs / outcome.decode_step_median_ms
        print(f"    {num_seqs:4} x {self.prompt}+{self.output}: {outcome.tokens_per_s:8.0f} tok/s, while all decode "
              f"{decoding:8.0f}, step {outcome.decode_step_median_ms:7.2f} ms (floor {floor_ms:.2f}), first token "
              f"{outcome.first_token_median_s:.2f} s")  # fmt: skip
        return asdict(outcome) | {"decode_tokens_per_s": decoding, "floor_ms": floor_ms,
                                  "of_floor": floor_ms / outcome.decode_step_median_ms}  # fmt: skip


def kernels(bench: Bench) -> Result:
    rows: list[Result] = []
    for case in gpu_kernels.cases(
        torch.float32 if bench.tiny else torch.bfloat16, bench.device.type, 64 if bench.tiny else 1
    ):
        if bench.device.type == "cpu":
            error, ok = gpu_kernels.check(case, torch.bfloat16)
            rows.append({"name": case.name, "max_error": error, "ok": ok})
            continue
        row = _attempt(lambda case=case: asdict(  # type: ignore[misc]
            gpu_kernels.report(case.name, case, torch.bfloat16, bench.bandwidth, bench.flops, 20)))  # fmt: skip
        rows.append({"name": case.name} | row)
        print("    " + " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
    return {"rows": rows}


def agreement(bench: Bench) -> Result:
    """How far log probabilities at the end of prompts are from transformers' in float32: ours, and its own in bfloat16.

    Of the twenty tokens that are likeliest in float32. Deep random weights amplify what rounding does, so the size of
    ours says nothing without the other's beside it.
    """
    prompts = random_prompts(8, 40 if bench.tiny else 500, bench.config.vocab_size, seed=2)
    engine, _ = make_engine(bench.config, limits_for(8, 528), graphs=False)
    clients = [Client(prompt, 1, logprobs=bench.config.vocab_size) for prompt in prompts]
    complete(engine, clients)
    del engine
    _free(bench)
    exact = gpu_transformers.last_log_probabilities(bench.shape, bench.config, prompts, torch.float32)
    _free(bench)
    rounded = gpu_transformers.last_log_probabilities(bench.shape, bench.config, prompts)
    ours, theirs = [], []
    for client, row, other in zip(clients, exact, rounded, strict=True):
        said, best = dict(client.tokens[0].sampled.top), row.topk(20).indices.tolist()
        ours += [abs(said[token] - float(row[token])) for token in best]
        theirs += [abs(float(other[token]) - float(row[token])) for token in best]
    print(f"    from float32, mean and largest: ours {mean(ours):.4f} {max(ours):.4f} nats, "
          f"transformers' in bfloat16 {mean(theirs):.4f} {max(theirs):.4f}")  # fmt: skip
    return {"compared": len(ours), "mean": mean(ours), "max": max(ours),
            "transformers_mean": mean(theirs), "transformers_max": max(theirs)}  # fmt: skip


def exactness(bench: Bench) -> Result:
    prompts = random_prompts(min(bench.usual, 8), bench.prompt, bench.config.vocab_size, seed=3)
    said: dict[str, list[list[int]]] = {}
    variations: dict[str, dict[str, Any]] = {
        "plain": {"graphs": False, "overlap": False},
        "dependent": {"graphs": False, "overlap": False},
        "graphs": {"overlap": False},
        "all": {},
    }
    for name, options in variations.items():
        clients = [Client(prompt, bench.output) for prompt in prompts]
        dependent_launch.ENABLED = name != "plain"
        try:
            engine, _ = make_engine(bench.config, bench.limits(len(prompts)), **options)
            complete(engine, clients)
        finally:
            dependent_launch.ENABLED = True  # for the parts that follow, also if this one fails
        said[name] = [[event.sampled.token for event in client.tokens] for client in clients]
        del engine
        _free(bench)
    different = len({token for tokens in said["plain"] for token in tokens})
    same = {name: tokens == said["plain"] for name, tokens in said.items() if name != "plain"}
    print(f"    {same} ({different} different tokens)")
    return same | {"ids": different}


def load(bench: Bench) -> Result:
    engine, model = make_engine(bench.config, bench.limits(max(bench.concurrency)))
    return {"rows": [_attempt(lambda n=n: bench.load(engine, model, n)) for n in bench.concurrency]}  # type: ignore[misc]


def prefill(bench: Bench) -> Result:
    engine, model = make_engine(bench.config, limits_for(1, max(bench.prefills), 8192))
    c, rows = bench.config, []
    matrices = sum(weight.numel() for name, weight in _matrices(model))
    for num_tokens in bench.prefills:
        prefill_seconds(engine, num_tokens, c.vocab_size, 1)
        seconds = prefill_seconds(engine, num_tokens, c.vocab_size)
        attention = 2 * num_tokens**2 * c.num_heads * c.head_dim * c.num_layers  # causal: half of all pairs
        floor = (2 * matrices * num_tokens + attention) / bench.flops
        print(f"    {num_tokens:6} tokens: {num_tokens / seconds:8.0f} tok/s, {floor / seconds:.2f} of the matrix rate")
        rows.append({"num_tokens": num_tokens, "seconds": seconds, "floor_s": floor, "of_floor": floor / seconds})
    return {"rows": rows}


def profile(bench: Bench) -> Result:
    if bench.device.type == "cpu":
        return {}
    engine, _ = make_engine(bench.config, limits_for(bench.usual, 2048))
    found = {f"decode {n}": decode_profile(engine, n, bench.prompt, bench.config.vocab_size) for n in (1, bench.usual)}
    found["prefill 2048"] = prefill_profile(engine, 2048, bench.config.vocab_size)
    for name, one in found.items():
        print(f"  {name}\n{one.text()}")
    return {name: asdict(one) for name, one in found.items()}


def transformers(bench: Bench) -> Result:
    """Of a quarter of the usual tokens: it takes minutes for all."""
    num_seqs, output, vocab_size = bench.usual, max(bench.output // 4, 1), bench.config.vocab_size
    engine, _ = make_engine(bench.config, bench.limits(num_seqs))
    run_load(engine, num_seqs, bench.prompt, 2, vocab_size)
    ours = run_load(engine, num_seqs, bench.prompt, output, vocab_size).tokens_per_s
    del engine
    _free(bench)
    prompts = random_prompts(num_seqs, bench.prompt, vocab_size)
    seconds = gpu_transformers.generate_batch_seconds(bench.shape, bench.config, prompts, output)
    rate = num_seqs * output / seconds
    print(f"    {num_seqs} x {bench.prompt}+{output}: {rate:.0f} tok/s, ours {ours:.0f}: {ours / rate:.1f} times")
    return {"num_seqs": num_seqs, "output_tokens": output, "seconds": seconds, "tokens_per_s": rate, "ours": ours}


def variants(bench: Bench) -> Result:
    rows: Result = {}
    for name, options in {
        "fp8 + fp8 kv": {"scheme": "fp8", "fp8_kv": True}, "fp8": {"scheme": "fp8"}, "int8": {"scheme": "int8"},
        "int4": {"scheme": "int4"}, "fp8 kv": {"fp8_kv": True}, "no graphs": {"graphs": False},
        "no overlap": {"overlap": False},
    }.items():  # fmt: skip
        print(f"  {name}")
        rows[name] = _attempt(lambda options=options: _variant(bench, options))  # type: ignore[misc]
        _free(bench)
    return rows


def _variant(bench: Bench, options: dict[str, Any]) -> Result:
    engine, model = make_engine(bench.config, bench.limits(bench.usual), **options)
    return {str(n): bench.load(engine, model, n) for n in (1, bench.usual)}


def _matrices(model: GpuModel) -> list[tuple[str, torch.Tensor]]:
    """Those that every prompt token passes: all but embedding and head."""
    return [
        (name, getattr(layer, name).weight.transposed)
        for layer in model._layers
        for name in ("qkv", "o", "gate_up", "down")
    ]


def _limits() -> tuple[float, float]:
    bandwidth, flops = gpu_kernels.copy_bytes_per_s(20), gpu_kernels.matmul_flops_per_s(torch.bfloat16, 20)
    print(f"copy {bandwidth / 1e9:.0f} GB/s (read + write), matmul {flops / 1e12:.0f} TFLOP/s")
    return bandwidth, flops


def _attempt(part: Callable[[], Result]) -> Result:
    """The part's result, or what went wrong: one failure must not lose the rest of a call that cannot be repeated."""
    try:
        return part()
    except Exception as error:  # the one place; see above
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def _free(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


PARTS = {
    part.__name__: part for part in (kernels, agreement, exactness, load, prefill, profile, transformers, variants)
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The GPU engine, measured in one call.")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model: to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and torch finds none; --tiny --device cpu only tries it out")
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)  # a toy's work is not worth dividing
    bench = Bench(torch.device(options.device), tiny=options.tiny)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    results: Result = {"device": device, "torch": torch.__version__, "bytes_per_s": bench.bandwidth,
                       "flops_per_s": bench.flops, "shape": bench.shape}  # fmt: skip
    for name in options.parts:
        print(f"{name}")
        started = time.perf_counter()
        results[name] = _attempt(lambda name=name: PARTS[name](bench))  # type: ignore[misc]
        results[name]["part_seconds"] = round(time.perf_counter() - started, 1)
        _free(bench)
        if options.out:
            options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
