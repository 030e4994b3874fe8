"""A few steps of every kind on a GpuRunner: chunks, mixed and decode steps, overlap, every way of sampling.

Run as a program it plays them in this process's kind of kernels and prints the tokens: the Triton interpreter must be
chosen before anything imports Triton.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gpu_runners import make_gpu_runner
from scripted_batches import Script

VARIANTS: dict[str, dict[str, str | torch.dtype | None]] = {
    "plain": {},
    "int4 and an fp8 cache": {"scheme": "int4", "kv_dtype": torch.float8_e4m3fn},
    "fp8": {"scheme": "fp8"},
}


def play(path: Path, variant: str) -> list[tuple[int, float | None]]:
    """Tokens and log probabilities in the order in which they were chosen."""
    runner, script = make_gpu_runner(path, **VARIANTS[variant]), Script()  # type: ignore[arg-type]
    a = script.add(range(20, 29))
    b = script.add(range(60, 80), temperature=0.8, top_k=40, top_p=0.9, seed=3)
    c = script.add([9], temperature=1.0, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, logprobs=2,
                   logit_bias={5: 1.0})  # fmt: skip
    chosen: list[tuple[int, float | None]] = []
    for rows, ending in ([(a, 9)], [a]), ([(a, 1), (b, 13)], [a]), ([(a, 1), (c, 1), (b, 7)], [a, c, b]):
        for seq, sampled in zip(ending, runner.launch(script.batch(*rows)).tokens(), strict=True):
            seq.tokens.append(sampled.token)
            chosen.append((sampled.token, sampled.logprob))
    ahead = runner.launch(script.batch((a, 1), (b, 1), (c, 1)))
    last = runner.launch(script.batch((b, 1), (a, 1), unknown={b: 1, a: 0}))
    return chosen + [(sampled.token, sampled.logprob) for step in (ahead, last) for sampled in step.tokens()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([play(Path(sys.argv[1]), variant) for variant in VARIANTS]))
