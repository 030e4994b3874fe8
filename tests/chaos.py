"""Random faults under load: every answer is compared with that of a single process, and nothing may stay behind.

    python tests/chaos.py --faults 200 --seed 1

Two prefill and two decode workers, of which one decode worker has no shared memory; with root their network can be
cut. Ends with `N faults, M requests, 0 wrong tokens, 0 leaks, K clean errors`; errors are allowed to requests that
were under way while the router or the bridge was struck, and to no others.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import network
import traffic
from cluster import Cluster
from processes import Process
from streams import Told
from tiny_models import make_model
from traffic import Heard

NUM_CLIENTS, NUM_QUESTIONS = 6, 72
LEAVES = 0.08  # share of the requests whose client goes away
PER_CHECK = 50  # faults between two looks at what is left behind
NOT_REACHED_S = 8.0
TRANSFER_TIMEOUT = "--transfer-timeout=4"

# stage:rank -> what may happen there, beside a delay.
POINTS = {
    "reserve:decode": ("kill", "stop", "refuse"),
    "queue:prefill": ("kill", "stop"),
    "bind:decode": ("kill", "refuse", "refuse"),
    "chunk-sent:prefill": ("kill", "drop", "duplicate"),
    "bytes-sent:prefill": ("kill", "stop", "refuse"),
    "chunk-received:decode": ("kill", "flip", "flip", "flip", "refuse"),
    "sealed:decode": ("kill", "stop"),
    "first-token:prefill": ("kill", "stop"),
    "step:prefill": ("kill", "stop"),
    "step:decode": ("kill", "stop"),
    "release:prefill": ("kill",),
    "release:decode": ("kill",),
    "redis-write:decode": ("drop",),
    "redis-write:prefill": ("drop",),
    "relay:router": ("kill", "stop"),
}
ELSEWHERE = ("kill redis", "stop redis", "kill bridge", "kill prefill", "stop prefill", "kill decode", "stop decode")
NETWORK = ("cut", "lossy", "slow", "down")


@dataclass
class Score:
    """What has come of it."""

    faults: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    left: int = 0
    clean_errors: int = 0
    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    forbidden_errors: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.faults.total()} faults, {self.requests} requests, {len(self.wrong)} wrong tokens, "
            f"{len(self.leaks)} leaks, {self.clean_errors} clean errors"
        )

    @property
    def good(self) -> bool:
        return not (self.wrong or self.leaks or self.forbidden_errors)


class Chaos:
    """Clients, and one task that strikes."""

    def __init__(self, cluster: Cluster, known: list[tuple[dict[str, Any], dict[int, Told]]], seed: int) -> None:
        self.score = Score()
        self._cluster, self._known = cluster, known
        self._rng = random.Random(seed)
        self._may_ask = asyncio.Event()
        self._num_asking = 0
        self._front_struck: list[tuple[float, float]] = []  # from when to when the way to the router was not whole
        self._errors: list[tuple[float, float, str]] = []  # not judged yet: begin, end and what it was
        self._log = (cluster.directory / "chaos.log").open("a")

    def say(self, line: str) -> None:
        self._log.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        self._log.flush()

    # ---------------------------------------------------------------- clients

    async def client(self, number: int) -> None:
        rng = random.Random(f"{number} {self._rng.random()}")
        while True:
            await self._may_ask.wait()
            self._num_asking += 1
            try:
                await self._ask(rng)
            finally:
                self._num_asking -= 1
            await asyncio.sleep(rng.random() * (1.0 if self._front_is_away else 0.1))

    @property
    def _front_is_away(self) -> bool:
        return any(end > time.monotonic() for _, end in self._front_struck)

    async def _ask(self, rng: random.Random) -> None:
        body, reference = rng.choice(self._known)
        salt = {"cache_salt": str(rng.random())} if rng.random() < 0.6 else {}
        leave_after = rng.randrange(12) if rng.random() < LEAVES else None
        began = time.monotonic()
        self.score.requests += 1
        try:
            heard = await traffic.listen(self._cluster.http, body | salt, leave_after)
        except TimeoutError:
            heard = Heard(error="HANG: nothing ended the request in time")
        self._judge(heard, reference, began, body)

    def _judge(self, heard: Heard, reference: dict[int, Told], began: float, body: dict[str, Any]) -> None:
        what = f"after {time.monotonic() - began:.1f} s, prompt of {len(body['prompt'])}: {heard.error}"
        self.score.left += heard.left
        if not heard.agrees(reference):
            self.score.wrong.append(what)
            self.say(f"WRONG {what}\n  heard {heard.told}\n  not   {reference}")
        elif heard.error:
            self._errors.append((began, time.monotonic(), what))
            self.say(f"error {what}")

    def judge_errors(self) -> None:
        """Once it is known when a router or bridge was struck: clients may see it sooner than this program does."""
        for began, ended, what in self._errors:
            allowed = any(began <= end and ended >= start for start, end in self._front_struck)
            if allowed and "HANG" not in what:
                self.score.clean_errors += 1
            else:
                self.score.forbidden_errors.append(what)
                self.say(f"ERROR {what}")
        self._errors.clear()

    # ---------------------------------------------------------------- faults

    async def strike(self, count: int) -> None:
        """Strikes so many times, and looks now and then whether anything was left behind."""
        self._may_ask.set()
        while self.score.faults.total() < count:
            try:
                name = await self._strike_once()
            except TimeoutError:
                continue  # no request came to that point
            if name:
                self.score.faults[name] += 1
                self.say(f"fault {self.score.faults.total()}: {name}")
                if self.score.faults.total() % PER_CHECK == 0 or self.score.faults.total() == count:
                    await self._check()
            await asyncio.sleep(self._rng.random() * 0.5)

    async def _strike_once(self) -> str:
        kind = self._rng.random()
        if kind < 0.12 and self._cluster.network:
            return await self._spoil_network(self._rng.choice(NETWORK))
        if kind < 0.3:
            action, role = self._rng.choice(ELSEWHERE).split()
            if not await self._may_strike(role, action):
                return ""
            victim = self._rng.choice([p for p in self._cluster.processes.values() if p.role == role])
            well = time.monotonic()
            victim.kill() if action == "kill" else victim.freeze()
            await self._recover(victim, well)
            return f"{action} {role}"
        place = self._rng.choice(list(POINTS))
        return await self._strike_at(place, self._rng.choice((*POINTS[place], "delay")))

    async def _strike_at(self, place: str, action: str) -> str:
        """Has the next process that comes to the place do this to itself. TimeoutError: nobody came."""
        assert self._cluster.faults is not None
        role = place.partition(":")[2]
        if not await self._may_strike(role, action):
            return ""
        armed = self._cluster.faults / f"{place}:{action}"
        seconds, times = self._rng.random() * 1.5, self._rng.choice((1, 1, 2)) if action == "flip" else 1
        armed.write_text(f"after={self._rng.randrange(8)} times={times} seconds={seconds:.2f}")
        deadline = (well := time.monotonic()) + NOT_REACHED_S
        while armed.exists():
            well = time.monotonic()
            await asyncio.sleep(0.01)
            if well > deadline:
                with contextlib.suppress(FileNotFoundError):  # somebody came at the last moment
                    armed.unlink()
                    raise TimeoutError
        if action in ("kill", "stop"):
            async with asyncio.timeout(5):
                while not (hit := [p for p in self._cluster.processes.values() if p.role == role and self._is_down(p)]):
                    await asyncio.sleep(0.01)
            await self._recover(hit[0], well)
        return f"{place}:{action}"

    @staticmethod
    def _is_down(process: Process) -> bool:
        return process.frozen or not process.alive

    async def _may_strike(self, role: str, action: str) -> bool:
        """A worker is struck only while all others can go on: with nobody left an error would be right."""
        if action not in ("kill", "stop") or role in ("redis", "bridge"):
            return True
        return sum(worker.ready for worker in (await self._cluster.status()).workers) == 4

    async def _recover(self, victim: Process, well: float) -> None:
        """well: when it was last seen to be so."""
        window = (well - 0.5, float("inf"))
        if victim.role in ("router", "bridge"):
            self._front_struck.append(window)
        if victim.alive:
            await asyncio.sleep(0.3 + self._rng.random() * 5)
            victim.thaw()
        else:
            await asyncio.sleep(self._rng.random())
            victim.start()
        if victim.role in ("router", "bridge"):
            await self._cluster.mend()  # a worker that came back just when Redis was struck is not there either
            self._front_struck.remove(window)
            self._front_struck.append((window[0], time.monotonic() + 0.5))

    async def _spoil_network(self, how: str) -> str:
        net = self._cluster.network
        assert net is not None
        if how == "down":
            net.down()
        else:
            net.spoil(*{"cut": (0, 1), "lossy": (0, 0.05), "slow": (0.02, 0)}[how])
        await asyncio.sleep(0.5 + self._rng.random() * 5)
        net.spoil()
        net.up()
        return f"network {how}"

    # ---------------------------------------------------------------- what is left

    async def _check(self) -> None:
        self._may_ask.clear()
        while self._num_asking:
            await asyncio.sleep(0.05)
        await self._cluster.mend()
        try:
            await self._cluster.settle()
        except AssertionError as error:
            self.score.leaks.append(str(error).splitlines()[0])
            self.say(f"LEAK {error}")
        self.judge_errors()
        print(f"{self.score}", flush=True)
        self._may_ask.set()


async def main(args: argparse.Namespace) -> int:
    directory = Path(args.directory or tempfile.mkdtemp(prefix="pagewire-chaos-"))
    model = make_model(directory / "model", "llama")
    bodies = traffic.questions(NUM_QUESTIONS, args.seed)
    (directory / "single").mkdir()
    known = list(zip(bodies, await traffic.references(model, directory / "single", bodies), strict=True))
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        why_not = network.why_not()
        net = None if why_not else stack.enter_context(network.Network())
        print(f"logs in {directory}; " + (f"no faults of the network: {why_not}" if why_not else "with its network"))
        cluster = Cluster(model, directory, prefill=2, decode=1, worker_flags=(*traffic.FLAGS, TRANSFER_TIMEOUT),
                          router_flags=(TRANSFER_TIMEOUT,), with_faults=True, network=net)  # fmt: skip
        try:
            await cluster.start()
            cluster.decode = 2
            await cluster.wait_serving(cluster.add_worker("decode", flags=("--lanes=gloo,grpc",)))
            await cluster.wait_workers(4)
            await cluster.raise_ceiling()
            chaos = Chaos(cluster, known, args.seed)
            clients = [asyncio.create_task(chaos.client(i)) for i in range(NUM_CLIENTS)]
            await chaos.strike(args.faults)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            chaos.judge_errors()
            await cluster.stop()
        finally:
            cluster.kill_all()
            await cluster.http.aclose()
    report(chaos.score, time.monotonic() - began)
    return 0 if chaos.score.good else 1


def report(score: Score, seconds: float) -> None:
    for name, count in sorted(score.faults.items()):
        print(f"  {count:4} {name}")
    for title, lines in (("wrong", score.wrong), ("leak", score.leaks), ("error not allowed", score.forbidden_errors)):
        for line in lines:
            print(f"{title}: {line}")
    print(f"{score.left} clients left early; {seconds:.0f} s")
    print(score)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", help="where logs go; default: a new one")
    sys.exit(asyncio.run(main(parser.parse_args())))
