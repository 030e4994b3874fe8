"""A whole system behind a real Envoy, with TLS on every connection: two bridges, one router or more, the workers."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import certificates
import grpc
import httpx
import openai
from cluster import Cluster, running
from edge import Edge, running_edge
from processes import Process, free_port, script


@dataclass
class Front:
    """A cluster whose two bridges speak HTTPS to Envoy alone, and the Envoy before them."""

    cluster: Cluster
    edge: Edge
    bridges: list[Process]
    routers: list[Process]
    tls: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.edge.http}"

    def client(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.tls / "ca.crt"))
        return httpx.AsyncClient(base_url=self.url, verify=context, timeout=60, trust_env=False)

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="-", http_client=self.client(), max_retries=0)

    def channel(self, role: str | None) -> grpc.aio.Channel:
        """To the gRPC port, with the certificate of a role or without one."""
        files = certificates.of(self.tls, role).read() if role else (None, None, (self.tls / "ca.crt").read_bytes())
        credentials = grpc.ssl_channel_credentials(files[2], files[1], files[0])
        return grpc.aio.secure_channel(f"localhost:{self.edge.grpc}", credentials)

    async def all_healthy(self) -> bool:
        return set((await self.edge.hosts("bridge")).values()) | set((await self.edge.hosts("router")).values()) == {""}


@asynccontextmanager
async def running_front(made: Cluster, num_routers: int = 1) -> AsyncIterator[Front]:
    """`made` has certificates."""
    tls, directory = made.tls, made.directory
    assert tls is not None
    async with running(made) as cluster:
        routers = [cluster.processes["router"], *(cluster.add_router(f"router-{i}") for i in range(1, num_routers))]
        bridges = [start_bridge(cluster, tls, f"bridge-{i}", routers) for i in (1, 2)]
        flags = [
            f"--bridges={','.join(b.address for b in bridges)}", f"--routers={','.join(r.address for r in routers)}",
            f"--ssl-certfile={tls}/edge.crt", f"--ssl-keyfile={tls}/edge.key", f"--ssl-ca-certs={tls}/ca.crt",
            *certificates.flags(tls, "client"),
        ]  # fmt: skip
        with running_edge(directory / "envoy", flags) as edge:
            it = Front(cluster, edge, bridges, routers, tls)
            await cluster.until(edge.ready, "Envoy is not ready")
            await cluster.until(it.all_healthy, "Envoy does not find everybody healthy")
            yield it


def start_bridge(cluster: Cluster, tls: Path, name: str, routers: list[Process]) -> Process:
    """One that takes connections from Envoy alone, by the certificates of services, and knows all routers."""
    port, files = free_port(), certificates.of(tls, "bridge")
    command = [*script("pagewire-bridge"), f"--router=ipv4:{','.join(r.address for r in routers)}", f"--port={port}",
               f"--redis-url={cluster.redis_url}", *certificates.flags(tls, "bridge"), f"--ssl-certfile={files.cert}",
               f"--ssl-keyfile={files.key}", f"--ssl-ca-certs={files.ca}", "--ssl-cert-reqs=2"]  # fmt: skip
    return cluster._add(name, command, port)
