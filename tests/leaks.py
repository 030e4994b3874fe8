"""What the processes of a cluster hold, and whether it is more than it may be once traffic has ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
from pagewire.v1 import worker_pb2, worker_pb2_grpc
from processes import Process

if TYPE_CHECKING:
    from cluster import Cluster

_COUNTERS = ("reserved_blocks", "num_running", "num_waiting", "open_transfers", "staging_slots")
_SLACK = 6  # a connection that is being made or taken down, a log file


class Resources(NamedTuple):
    descriptors: int
    threads: int
    lane_maps: int  # shared memory of lanes that is mapped
    pairs: int = 0  # connections with other workers for KV to come or go, where somebody asked

    def most(self, other: Resources) -> Resources:
        return Resources(*map(max, self, other))


def resources(process: Process) -> Resources:
    running = psutil.Process(process.pid)
    maps = Path(f"/proc/{process.pid}/maps")
    lanes = maps.read_text().count("/memfd:pagewire") if maps.exists() else 0
    return Resources(running.num_fds(), running.num_threads(), lanes)


async def _with_pairs(cluster: Cluster, process: Process) -> Resources:
    if process not in cluster.workers:
        return resources(process)
    async with cluster.channel(process) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        text = (await stub.Metrics(worker_pb2.WorkerServiceMetricsRequest(), timeout=30)).text
    [pairs] = [line.split()[1] for line in text.splitlines() if line.startswith("pagewire_kv_pairs ")]
    return resources(process)._replace(pairs=int(float(pairs)))


async def ceilings(cluster: Cluster) -> dict[str, Resources]:
    """The most that a process of each role holds now. Take it while all prefill and decode workers are paired."""
    found: dict[str, Resources] = {}
    for process in filter(lambda p: p.alive, cluster.processes.values()):
        held = await _with_pairs(cluster, process)
        found[process.role] = held.most(found.get(process.role, held))
    return found


async def above(cluster: Cluster, ceiling: dict[str, Resources]) -> list[str]:
    """Who holds more than its ceiling and what its further pairs need: a fetched prefix pairs any two workers."""
    found = []
    for process in filter(lambda p: p.alive and p.role in ceiling, cluster.processes.values()):
        now, most = await _with_pairs(cluster, process), ceiling[process.role]
        more = max(now.pairs - most.pairs, 0)
        for name, slack in (("descriptors", _SLACK + 5 * more), ("threads", _SLACK + 3 * more), ("lane_maps", more)):
            if getattr(now, name) > getattr(most, name) + slack:
                found.append(f"{process.name} has {getattr(now, name)} {name}, at most {most} was needed")
    return found


def names_in_shared_memory() -> set[str]:
    directory = Path("/dev/shm")
    return {name for name in os.listdir(directory) if name.startswith("pagewire")} if directory.is_dir() else set()


async def held(cluster: Cluster) -> list[str]:
    """Blocks, credits, transfers, staging slots and requests that somebody holds."""
    left = []
    for process in cluster.workers:
        stats = await cluster.worker_stats(process)
        left += [f"{process.name}.{name} = {getattr(stats, name)}" for name in _COUNTERS if getattr(stats, name)]
        if stats.free_blocks != stats.total_blocks:
            left.append(f"{process.name} holds {stats.total_blocks - stats.free_blocks} blocks")
    status = await cluster.status()
    if status.queued_requests or status.running_requests:
        left.append(f"router: {status.queued_requests} queued, {status.running_requests} running")
    return left
