"""What the processes of a cluster hold, and whether it is more than it may be once traffic has ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
from processes import Process

if TYPE_CHECKING:
    from cluster import Cluster

_COUNTERS = ("reserved_blocks", "num_running", "num_waiting", "open_transfers", "staging_slots")
_SLACK = 6  # a connection that is being made or taken down, a log file


class Resources(NamedTuple):
    descriptors: int
    threads: int
    lane_maps: int  # shared memory of lanes that is mapped

    def most(self, other: Resources) -> Resources:
        return Resources(*map(max, self, other))


def resources(process: Process) -> Resources:
    running = psutil.Process(process.pid)
    maps = Path(f"/proc/{process.pid}/maps")
    lanes = maps.read_text().count("/memfd:pagewire") if maps.exists() else 0
    return Resources(running.num_fds(), running.num_threads(), lanes)


def ceilings(cluster: Cluster) -> dict[str, Resources]:
    """The most that a process of each role holds now. Take it while all pairs of workers are up."""
    found: dict[str, Resources] = {}
    for process in filter(lambda p: p.alive, cluster.processes.values()):
        held = resources(process)
        found[process.role] = held.most(found.get(process.role, held))
    return found


def above(cluster: Cluster, ceiling: dict[str, Resources]) -> list[str]:
    """Who holds more than its ceiling."""
    found = []
    for process in filter(lambda p: p.alive and p.role in ceiling, cluster.processes.values()):
        for name, now, most in zip(Resources._fields, resources(process), ceiling[process.role], strict=True):
            if now > most + (0 if name == "lane_maps" else _SLACK):
                found.append(f"{process.name} has {now} {name}, at most {most} were needed")
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
