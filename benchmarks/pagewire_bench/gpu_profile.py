"""Where the device's time goes: torch's profiler over some steps of an engine, summed by kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pagewire_engine.engine import Engine
from torch.profiler import ProfilerActivity, profile

from pagewire_bench.gpu_load import Client, complete, random_prompts


@dataclass(frozen=True)
class Spent:
    """Of one step, averaged."""

    name: str
    calls: float
    us: float


@dataclass(frozen=True)
class Profile:
    """`busy_us` of `wall_us` a kernel ran; kernels: the dearest first."""

    wall_us: float
    busy_us: float
    kernels: list[Spent]

    def text(self, num_rows: int = 16) -> str:
        rows = [f"    {self.wall_us:.0f} us a step, kernels {self.busy_us:.0f} us"]
        rows += [f"    {k.us:9.1f} us {k.calls:6.1f} x  {k.name[:90]}" for k in self.kernels[:num_rows]]
        return "\n".join(rows)


def decode_profile(engine: Engine, num_seqs: int, prompt_tokens: int, vocab_size: int, num_steps: int = 8) -> Profile:
    """Steps in which all of `num_seqs` sequences decode."""
    num_tokens = 3 * num_steps + num_seqs  # the first still decodes when the last begins
    clients = [Client(p, num_tokens) for p in random_prompts(num_seqs, prompt_tokens, vocab_size, seed=4)]
    for client in clients:
        engine.submit(client.request)
    while any(len(client.tokens) < num_steps for client in clients):
        engine.step()
    found = _profile(lambda: [engine.step() for _ in range(num_steps)], num_steps)
    complete(engine, [])
    return found


def prefill_profile(engine: Engine, num_tokens: int, vocab_size: int) -> Profile:
    """One prompt until its token."""
    prompts = random_prompts(2, num_tokens, vocab_size, seed=5)
    complete(engine, [Client(prompts[0], 1)])
    return _profile(lambda: complete(engine, [Client(prompts[1], 1)]), 1)


def _profile(work: Callable[[], object], num_steps: int) -> Profile:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    kernels = [
        Spent(row.key, row.count / num_steps, row.self_device_time_total / num_steps)
        for row in profiler.key_averages()
        if row.self_device_time_total
    ]
    kernels.sort(key=lambda row: -row.us)
    return Profile(1e6 * wall / num_steps, sum(row.us for row in kernels), kernels)
