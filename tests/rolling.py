"""Everything is restarted, one process after the other, under a load that never stops: no request is lost.

    python tests/rolling.py --rounds 2 [--clients 8]

Two bridges, routers, prefill and decode workers behind a real Envoy, with TLS on every connection. The new one is
started as its image starts it: its entry point, with variables instead of flags. Every answer is compared with a
reference.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import certificates
import traffic
from cluster import PAIRS, Cluster
from front import Front, running_front
from pagewire_core.settings import variable_of
from processes import Process, free_port
from streams import prompt_of
from tiny_models import make_model, reference_greedy

FLAGS = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=32", "--threads=1")
NUM_PROMPTS, NUM_TOKENS = 5, 60
DOCKERFILE = Path(__file__).parents[1] / "Dockerfile"


@dataclass
class Load:
    """Streams through the edge, each client's next as soon as one has ended. lost: what did not go as it must."""

    front: Front
    answers: Sequence[tuple[list[int], list[int]]]  # prompts and what follows them
    num_told: int = 0
    lost: list[str] = field(default_factory=list)

    async def client(self, number: int) -> None:
        async with self.front.client() as http:
            while True:
                prompt, expected = self.answers[(number + self.num_told) % len(self.answers)]
                body = {"prompt": prompt, "max_tokens": len(expected), "temperature": 0, "ignore_eos": True,
                        "return_token_ids": True, "stream": True}  # fmt: skip
                heard = await traffic.listen(http, body)
                if heard.error or heard.told[0][1] != expected:
                    self.lost.append(heard.error or f"{heard.told[0][1]} is not {expected}")
                self.num_told += 1

    async def more(self, count: int) -> None:
        """Returns when so many further answers have come."""
        until = self.num_told + count
        while self.num_told < until:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def under_load(front: Front, num_clients: int) -> AsyncIterator[Load]:
    """Asserts at the end that nothing was lost."""
    prompts = [prompt_of(30 + 17 * i, 100 + i) for i in range(NUM_PROMPTS)]
    load = Load(front, [(p, reference_greedy(front.cluster.model, p, NUM_TOKENS)[0]) for p in prompts])
    clients = [asyncio.create_task(load.client(number)) for number in range(num_clients)]
    try:
        await load.more(num_clients)
        yield load
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    assert not load.lost, f"{len(load.lost)} of {load.num_told} requests were lost: {load.lost}"
    await front.cluster.settle()


async def restart(load: Load, process: Process, num_clients: int) -> None:
    """As an orchestrator replaces a container; returns when answers came that may have been given by the new one."""
    cluster = load.front.cluster
    assert await asyncio.to_thread(process.stop) == 0, process.log.read_text()[-2000:]
    await load.more(num_clients)
    process.start()
    if process.role != "bridge":
        await cluster.wait_serving(process)
    await cluster.wait_workers(cluster.prefill + cluster.decode)
    if process.role in ("bridge", "router"):
        await cluster.until(load.front.all_healthy, f"Envoy does not find {process.name} healthy")
    await load.more(2 * num_clients)


# ---------------------------------------------------------------- as images do it


def as_its_image(process: Process) -> None:
    """Its entry point and environment are those of the image; what flags said, variables say."""
    target = {"prefill": "worker", "decode": "worker"}.get(process.role, process.role)
    stages = re.split(r"\nFROM ", DOCKERFILE.read_text())
    [runtime] = [stage for stage in stages if stage.split("\n")[0].endswith(" AS runtime")]
    [image] = [stage for stage in stages if stage.split("\n")[0].endswith(f" AS {target}")]
    entry = re.findall(r'ENTRYPOINT \["(.+)"\]', image)[0]
    assert entry == Path(process.command[0]).name
    of_image = re.findall(r"(PAGEWIRE_\w+|PYTHON\w+)=(\S+)", runtime + image)
    flags = (flag.removeprefix("--").split("=", 1) for flag in process.command[1:])
    process.environment = dict(of_image) | {variable_of(name): value for name, value in flags}
    process.environment["PAGEWIRE_HOST"] = "127.0.0.1"
    if "PAGEWIRE_OLLAMA_PORT" in process.environment:  # which containers have each for itself
        process.environment["PAGEWIRE_OLLAMA_PORT"] = str(free_port())
    process.command = process.command[:1]


async def main(rounds: int, num_clients: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        tls = certificates.made(Path(directory) / "tls")
        model = make_model(Path(directory) / "model", "llama")
        made = Cluster(model, Path(directory), prefill=2, decode=2, worker_flags=FLAGS, router_flags=PAIRS, tls=tls)
        async with running_front(made, num_routers=2) as front, under_load(front, num_clients) as load:
            victims = [*made.workers, *front.bridges, *front.routers]
            for process in victims:
                as_its_image(process)
            begun = time.monotonic()
            for process in victims * rounds:
                told, lost, at = load.num_told, len(load.lost), time.monotonic()
                await restart(load, process, num_clients)
                print(f"{process.name:10} in {time.monotonic() - at:5.1f} s: {load.num_told - told} answers, "
                      f"{len(load.lost) - lost} lost", flush=True)  # fmt: skip
        print(
            f"{rounds * len(victims)} restarts in {time.monotonic() - begun:.0f} s, {load.num_told} requests, none lost"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--clients", type=int, default=6)
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.rounds, arguments.clients)))
