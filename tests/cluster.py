"""Real processes of every service on free loopback ports, for end-to-end tests.

Pages are poisoned; `settle` asserts that nothing is held anywhere once traffic has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import certificates
import grpc
import httpx
import leaks
from grpc_health.v1 import health_pb2, health_pb2_grpc
from network import Network
from pagewire.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from pagewire_core.redis_link import REDIS_ERRORS, ping
from pagewire_core.rpc import open_channel
from processes import Process, free_port, redis_binary, script
from prometheus_client.parser import text_string_to_metric_families

START_S = 60.0
ANSWER_S = 30.0  # of a process that others on its cores may hold up
SETTLE_S = 30.0
# Never a prompt on a decode worker because the others are predicted to be slower, as they are on a busy machine: for
# tests of hand-overs.
PAIRS = ("--routing-policy=prefix",)
SMALL = ("--kv-cache-memory-bytes=4M", "--max-model-len=256", "--max-num-batched-tokens=40", "--threads=1")


@dataclass
class Cluster:
    """prefill, decode and both: how many workers of each role. role_flags: of one's workers, besides worker_flags.

    tls: certificates of every role, for mutual TLS; Redis is then on a socket of this user. https: also to clients.
    """

    model: Path
    directory: Path
    prefill: int = 1
    decode: int = 1
    both: int = 0
    worker_flags: Sequence[str] = SMALL
    role_flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    router_flags: Sequence[str] = ()
    bridge_flags: Sequence[str] = ()
    tls: Path | None = None
    https: bool = False
    with_faults: bool = False
    network: Network | None = None  # where the workers live, if not beside everybody else
    processes: dict[str, Process] = field(default_factory=dict)
    ceiling: dict[str, leaks.Resources] = field(default_factory=dict)
    http: httpx.AsyncClient = field(init=False)

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        self._names_before = leaks.names_in_shared_memory()
        bridge_port = free_port()
        self.base_url = f"http{'s' if self.https else ''}://127.0.0.1:{bridge_port}"
        self.http = self.client()
        self._start_redis()
        await self._wait_redis()
        for role in ("prefill", "decode", "both"):
            for _ in range(getattr(self, role)):
                self.add_worker(role, wait=False, flags=self.role_flags.get(role, ()))
        self.add_router("router")
        self.add_bridge("bridge", bridge_port)
        await asyncio.gather(*(self.wait_serving(p) for p in self.processes.values() if p.name.partition("-")[0] in (
            "prefill", "decode", "both", "router")))  # fmt: skip
        await self.until(self.healthy, "the bridge is not healthy")
        await self.wait_workers(self.prefill + self.decode + self.both)

    def client(self) -> httpx.AsyncClient:
        """Of the first bridge; the caller closes it."""
        verify = ssl.create_default_context(cafile=str(self.tls / "ca.crt")) if self.tls and self.https else True
        return httpx.AsyncClient(base_url=self.base_url, verify=verify, timeout=60, trust_env=False)

    def _start_redis(self) -> None:
        port, outside = free_port(), self.network.outside if self.network else "127.0.0.1"
        where = ["--port", str(port), "--bind", outside, "--protected-mode", "no"]
        self.redis_url = f"redis://{outside}:{port}/0"
        if self.tls:
            socket = self.directory / "redis.sock"
            where = ["--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"]
            self.redis_url = f"unix://{socket}?db=0"
        self._add("redis", [redis_binary(), *where, "--save", "", "--appendonly", "no"], port)

    def _add(self, name: str, command: list[str], port: int, host: str = "127.0.0.1") -> Process:
        process = Process(name, command, f"{host}:{port}", self.directory / f"{name}.log", self.faults)
        self.processes[name] = process
        process.start()
        return process

    def add_worker(self, role: str, wait: bool = True, flags: Sequence[str] = ()) -> Process:
        name = f"{role}-{sum(p.startswith(role) for p in self.processes)}"
        port, host, enter = free_port(), "127.0.0.1", list[str]()
        if self.network:
            host, enter = self.network.host(role), self.network.enter(role)
        command = [*enter, *script("pagewire-worker"), f"--role={role}", f"--model={self.model}", f"--host={host}",
                   f"--port={port}", f"--redis-url={self.redis_url}", *self._tls("worker"), *self.worker_flags,
                   *flags]  # fmt: skip
        return self._add(name, command, port, host)

    def add_router(self, name: str) -> Process:
        """Not waited for."""
        port = free_port()
        command = [*script("pagewire-router"), f"--model={self.model}", f"--port={port}",
                   f"--redis-url={self.redis_url}", *self._tls("router"), *self.router_flags]  # fmt: skip
        return self._add(name, command, port)

    def add_bridge(self, name: str, port: int) -> Process:
        """Not waited for."""
        router = self.processes["router"].address
        command = [*script("pagewire-bridge"), f"--router={router}", f"--port={port}", f"--redis-url={self.redis_url}",
                   *self._tls("bridge"), *self._edge(), *self.bridge_flags]  # fmt: skip
        return self._add(name, command, port)

    def _tls(self, role: str) -> list[str]:
        return certificates.flags(self.tls, role) if self.tls else []

    def _edge(self) -> list[str]:
        return [f"--ssl-certfile={self.tls}/edge.crt", f"--ssl-keyfile={self.tls}/edge.key"] if self.https else []

    def channel(self, process: Process) -> grpc.aio.Channel:
        """As an operator."""
        tls = certificates.of(self.tls, "operator") if self.tls else None
        return open_channel(process.address, tls, "router" if process.role == "router" else "worker")

    @property
    def faults(self) -> Path | None:
        """The directory in which a file is a fault, see pagewire_core.faults."""
        directory = self.directory / "faults"
        if self.with_faults:
            directory.mkdir(exist_ok=True)
        return directory if self.with_faults else None

    @contextmanager
    def slow_steps(self, seconds: float = 0.01) -> Iterator[None]:
        """So that streams are still under way when something is done meanwhile, however late that is."""
        assert self.faults is not None
        fault = self.faults / "step:decode:delay"
        fault.write_text(f"times=1000000 seconds={seconds}")
        try:
            yield
        finally:
            fault.unlink()

    async def stop(self) -> None:
        order = {"bridge": 0, "router": 1, "redis": 3}
        for process in sorted(self.processes.values(), key=lambda process: order.get(process.role, 2)):
            if process.alive:
                code = process.stop()
                assert code == 0, f"{process.name} ended with {code}: {process.log.read_text()[-2000:]}"

    def kill_all(self) -> None:
        for process in self.processes.values():
            if process.alive:
                process.kill()

    def logs(self) -> str:
        return "\n".join(f"---- {p.name}\n{p.log.read_text()[-3000:]}" for p in self.processes.values())

    async def mend(self) -> None:
        """Thaws who is frozen and starts who is dead again; returns when everybody is at work."""
        dead = [p for p in self.processes.values() if not p.alive]
        for process in self.processes.values():
            if process in dead:
                process.start()
            elif process.frozen:
                process.thaw()
            if process.role == "redis":  # the first of them
                await self._wait_redis()
        for process in dead:
            if process.role not in ("redis", "bridge"):
                await self.wait_serving(process)
        await self.until(self.healthy, "the bridge is not healthy")
        await self.wait_workers(self.prefill + self.decode + self.both)

    # ---------------------------------------------------------------- waiting

    async def until(self, condition: Any, complaint: str, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not await condition():
            assert time.monotonic() < deadline, f"{complaint}\n{self.logs()}"
            await asyncio.sleep(0.05)

    async def healthy(self) -> bool:
        try:
            return (await self.http.get("/health")).status_code == 200
        except httpx.TransportError:
            return False

    async def _wait_redis(self) -> None:
        """Before anybody else starts: none does without it, and a forked worker is quicker than Redis."""

        async def answers() -> bool:
            try:
                await ping(self.redis_url)
            except REDIS_ERRORS:
                return False
            return True

        await self.until(answers, "Redis does not answer")

    async def wait_serving(self, process: Process) -> None:
        """gRPC health SERVING."""

        async def serving() -> bool:
            assert process.alive, f"{process.name} ended at start:\n{process.log.read_text()[-3000:]}"
            async with self.channel(process) as channel:
                try:
                    reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
                except grpc.RpcError:
                    return False
            return reply.status == health_pb2.HealthCheckResponse.SERVING or process.role == "router"

        await self.until(serving, f"{process.name} is not serving")

    async def wait_workers(self, count: int) -> None:
        """The router knows exactly `count` ready workers."""

        async def known() -> bool:
            return sum(w.ready for w in (await self.status()).workers) == count

        await self.until(known, f"the router does not know {count} workers")

    # ---------------------------------------------------------------- asking

    @asynccontextmanager
    async def inference(self) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
        async with self.channel(self.processes["router"]) as channel:
            yield inference_pb2_grpc.InferenceServiceStub(channel)

    async def status(self) -> inference_pb2.StatusResponse:
        async with self.inference() as stub:
            return await stub.Status(inference_pb2.StatusRequest(), timeout=ANSWER_S)

    async def complete(self, prompt: Sequence[int] | str, **body: Any) -> dict[str, Any]:
        """POST /v1/completions, greedy unless told otherwise, token ids in the answer; the JSON."""
        request = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "temperature": 0, "max_tokens": 12,
                   "return_token_ids": True} | body  # fmt: skip
        response = await self.http.post("/v1/completions", json=request)
        assert response.status_code == 200, response.text
        return response.json()

    async def metrics(self) -> dict[str, float]:
        """Sum over processes of every sample: by name, role:name and name{label=value}."""
        response = await self.http.get("/metrics")
        assert response.status_code == 200
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                role = sample.labels.get("instance", "").partition("-")[0]
                labelled = [f"{sample.name}{{{k}={v}}}" for k, v in sample.labels.items()]
                for key in (sample.name, f"{role}:{sample.name}", *labelled):
                    totals[key] = totals.get(key, 0) + sample.value
        return totals

    async def worker_stats(self, process: Process) -> worker_pb2.StatsResponse:
        async with self.channel(process) as channel:
            stats = worker_pb2_grpc.WorkerServiceStub(channel).Stats(worker_pb2.StatsRequest(), timeout=ANSWER_S)
            return await anext(aiter(stats))

    @property
    def workers(self) -> list[Process]:
        return [p for p in self.processes.values() if p.role in ("prefill", "decode", "both") and p.alive]

    async def settle(self) -> None:
        """Asserts that blocks, credits, transfers, staging slots and requests are back to zero, and descriptors,
        threads and shared memory not above the ceiling."""
        deadline = time.monotonic() + SETTLE_S
        while left := await self._left():
            assert time.monotonic() < deadline, f"leaked: {left}\n{self.logs()}"
            await asyncio.sleep(0.05)

    async def _left(self) -> list[str]:
        new_names = leaks.names_in_shared_memory() - self._names_before
        return [*await leaks.held(self), *await leaks.above(self, self.ceiling), *new_names]

    async def raise_ceiling(self) -> None:
        """Sends requests until every pair of workers is up; from now on nobody may need more than that."""
        num_pairs = 2 * self.prefill * self.decode
        for i in itertools.count():
            prompts = [[5 + (i * 64 + j * 8 + k) % 300 for k in range(40)] for j in range(8)]
            await asyncio.gather(*(self.complete(prompt, max_tokens=2) for prompt in prompts))
            if (await self.metrics()).get("pagewire_kv_pairs", 0) >= num_pairs:
                break
            assert i < 50, f"not every pair of workers came up\n{self.logs()}"
        await self.settle()
        self.ceiling = await leaks.ceilings(self)


@asynccontextmanager
async def running(cluster: Cluster) -> AsyncIterator[Cluster]:
    """Starts, checks for leaks at the end, stops; kills everything whatever happens."""
    try:
        await cluster.start()
        yield cluster
        await cluster.settle()
        await cluster.stop()
    finally:
        cluster.kill_all()
        await cluster.http.aclose()
