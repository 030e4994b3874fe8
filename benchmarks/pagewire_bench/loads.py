"""The loads that servers are compared under, and one of them applied to a running server."""

from __future__ import annotations

import dataclasses
import resource
import time
from dataclasses import dataclass
from typing import Any

from pagewire_cli.load import pace, report
from pagewire_cli.load.client import Outcome, Target

from pagewire_bench.token_workload import TokenWorkload

_QUICK_OUTPUT = 64


@dataclass(frozen=True)
class Load:
    """Requests of equal length in a closed loop. Loads of one output token measure how fast prompts are computed."""

    concurrency: int
    num_requests: int
    prompt_len: int
    output_len: int
    shared_prefix_share: float = 0.0

    @property
    def context(self) -> int:
        return self.prompt_len + self.output_len

    def quick(self) -> Load:
        """As many requests as are in flight, and short answers."""
        output_len = min(self.output_len, _QUICK_OUTPUT)
        return dataclasses.replace(self, num_requests=self.concurrency, output_len=output_len)


LOADS = {
    "1 stream": Load(1, 4, 128, 128),
    "8 streams": Load(8, 16, 128, 128),
    "32 streams": Load(32, 64, 128, 128),
    "64 streams": Load(64, 64, 128, 128),
    "8 streams, prompts of 512": Load(8, 16, 512, 64),
    "8 streams, prompts of 2048": Load(8, 8, 2048, 64),
    "8 streams, 90% of 512 shared": Load(8, 32, 512, 64, 0.9),
    "prompt of 128": Load(1, 8, 128, 1),
    "prompt of 512": Load(1, 4, 512, 1),
    "prompt of 2048": Load(1, 3, 2048, 1),
}
QUICK_LOADS = ("1 stream", "8 streams", "32 streams", "prompt of 512")
_WARM_UP = (Load(1, 1, 2048, 4), Load(8, 8, 128, 16), Load(32, 32, 64, 8))


async def apply(load: Load, target: Target, num_tokens: int, seed: str) -> dict[str, Any]:
    """What `report.summarise` says, and the CPU seconds that the load generator took of the machine.

    An answer with fewer tokens than asked for is an error: it would make a server look fast.
    """
    workload = TokenWorkload(num_tokens, load.prompt_len, load.output_len, load.shared_prefix_share, seed)

    async def send(index: int) -> Outcome:
        outcome = await target.complete(workload.request(index))
        if not outcome.error and outcome.completion_tokens != load.output_len:
            outcome.error = f"{outcome.completion_tokens} of {load.output_len} tokens"
        return outcome

    started, cpu = time.perf_counter(), _cpu_seconds()
    outcomes = await pace.keep_in_flight(load.concurrency, pace.indices(load.num_requests, None), send)
    wall_s = time.perf_counter() - started
    return report.summarise(outcomes, wall_s) | {"client_cpu_s": _cpu_seconds() - cpu}


async def warm_up(target: Target, num_tokens: int, longest: int, seed: str) -> None:
    """Sizes of every kind, so that what is compiled or allocated at first use is there; no longer than `longest`."""
    for load in _WARM_UP:
        prompt_len = min(load.prompt_len, longest - load.output_len)
        await apply(dataclasses.replace(load, prompt_len=prompt_len), target, num_tokens, f"{seed}/warm-up")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
