"""Mixed traffic for many minutes on two prefill and two decode workers: nothing grows, answers stay right.

    python tests/soak.py --minutes 20 --out benchmarks/results/soak.json

Two in a hundred clients leave early. Now and then everybody pauses, and memory, descriptors, threads and free blocks
of each process are noted; a line is fitted through what was noted after the first quarter. Every whole answer is
compared with that of a single process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import leaks
import numpy as np
import psutil
import traffic
from cluster import Cluster, running
from streams import Told
from tiny_models import make_model

NUM_CLIENTS, NUM_QUESTIONS, NUM_SAMPLES = 4, 72, 40
LEAVES = 0.02
WARM_UP = 0.25  # share of the samples that no line is fitted through
# How much the fitted line may rise over the time it is fitted to. Memory: the allocator's noise, beside it nothing.
MOST = {"memory_mib": 8.0, "descriptors": 2.0, "threads": 2.0, "lane_maps": 0.5, "held_blocks": 0.0}


@dataclass
class Soak:
    """What the clients have seen, and the samples: process -> quantity -> a value for each sample."""

    cluster: Cluster
    known: list[tuple[dict[str, Any], dict[int, Told]]]
    requests: int = 0
    checked: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    may_ask: asyncio.Event = field(default_factory=asyncio.Event)
    num_asking: int = 0

    async def client(self, number: int) -> None:
        rng = random.Random(number)
        while True:
            await self.may_ask.wait()
            self.num_asking += 1
            await self._ask(rng)
            self.num_asking -= 1
            await asyncio.sleep(rng.random() * 0.3)

    async def _ask(self, rng: random.Random) -> None:
        body, reference = rng.choice(self.known)
        salt = {"cache_salt": str(rng.random())} if rng.random() < 0.6 else {}
        self.requests += 1
        leave_after = rng.randrange(12) if rng.random() < LEAVES else None
        try:
            heard = await traffic.listen(self.cluster.http, body | salt, leave_after)
        except TimeoutError:
            self.errors.append("nothing ended the request in time")
            return
        self.left += heard.left
        self.checked += not heard.left and not heard.error
        if heard.error:
            self.errors.append(heard.error)
        if not heard.agrees(reference):
            self.wrong.append(f"prompt of {len(body['prompt'])}: {heard.told} is not {reference}")

    async def sample(self, seconds: float) -> None:
        """Pauses everybody; asserts that nothing is held, and notes what every process needs."""
        self.may_ask.clear()
        while self.num_asking:
            await asyncio.sleep(0.05)
        await self.cluster.settle()
        self.seconds.append(round(seconds, 1))
        for process in self.cluster.processes.values():
            now: dict[str, float] = dict(leaks.resources(process)._asdict())
            del now["pairs"]
            now["memory_mib"] = round(psutil.Process(process.pid).memory_info().rss / 2**20, 2)
            if process in self.cluster.workers:
                stats = await self.cluster.worker_stats(process)
                now["held_blocks"] = stats.total_blocks - stats.free_blocks
            for name, value in now.items():
                self.samples.setdefault(process.name, {}).setdefault(name, []).append(value)
        self.may_ask.set()

    def rises(self) -> dict[str, dict[str, float]]:
        """How much the line through each quantity rises over the time it is fitted to."""
        first = int(len(self.seconds) * WARM_UP)
        t = np.array(self.seconds[first:])
        return {
            process: {
                name: round(float(np.polyfit(t, values[first:], 1)[0] * (t[-1] - t[0])), 3)
                for name, values in quantities.items()
            }
            for process, quantities in self.samples.items()
        }

    def complaints(self) -> list[str]:
        grown = [
            f"{process}: {name} rose by {rise}, more than {MOST[name]}"
            for process, quantities in self.rises().items()
            for name, rise in quantities.items()
            if rise > MOST[name]
        ]
        return [*grown, *self.wrong, *self.errors]

    def result(self) -> dict[str, Any]:
        return {
            "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
            "minutes": round(self.seconds[-1] / 60, 1), "requests": self.requests, "left_early": self.left,
            "answers_compared": self.checked, "wrong_answers": len(self.wrong), "errors": len(self.errors),
            "rises": self.rises(), "most": MOST, "complaints": self.complaints(), "seconds": self.seconds,
            "samples": self.samples,
        }  # fmt: skip


async def main(args: argparse.Namespace) -> int:
    directory = Path(args.directory or tempfile.mkdtemp(prefix="pagewire-soak-"))
    model = make_model(directory / "model", "llama")
    bodies = traffic.questions(NUM_QUESTIONS, 1)
    (directory / "single").mkdir()
    known = list(zip(bodies, await traffic.references(model, directory / "single", bodies), strict=True))
    print(f"logs in {directory}", flush=True)
    async with running(Cluster(model, directory, prefill=2, decode=2, worker_flags=traffic.FLAGS)) as cluster:
        await cluster.raise_ceiling()
        soak = Soak(cluster, known)
        clients = [asyncio.create_task(soak.client(i)) for i in range(NUM_CLIENTS)]
        began = time.monotonic()
        for i in range(NUM_SAMPLES + 1):
            await asyncio.sleep(max(began + i * args.minutes * 60 / NUM_SAMPLES - time.monotonic(), 0))
            await soak.sample(time.monotonic() - began)
            done = next((client for client in clients if client.done()), None)
            if done:
                done.result()
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    result = soak.result()
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    for line in result["complaints"]:
        print(line)
    print(f"{result['minutes']} minutes, {soak.requests} requests, {soak.left} left early, {soak.checked} answers "
          f"compared, {len(soak.wrong)} wrong, {len(soak.errors)} errors")  # fmt: skip
    return 1 if result["complaints"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--directory", help="where logs go; default: a new one")
    sys.exit(asyncio.run(main(parser.parse_args())))
