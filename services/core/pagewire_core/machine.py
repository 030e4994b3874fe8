"""Cores and memory that this process may use: the machine's, within the limits of the container that it runs in.

A container sees all of its host. What it is held to is told by Linux control groups, which come in two versions with
other files each (kernel documentation, cgroup-v2 and cgroup-v1): a process in version 2 is in one group, in version 1
in one for each controller, and every group above holds it to its own limits as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def available_cpus() -> tuple[int, ...]:
    """Cores that this process and its children may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def num_threads(cpus: tuple[int, ...] = (), root: Path = _ROOT) -> int:
    """How many threads may compute at once on these cores, or on all there are.

    A container with `--cpus 2` may run on every core, but two seconds in each second: with more threads all of them are
    halted for the rest of a period.
    """
    quotas = [quota for group in _groups("cpu", root) if (quota := _quota(group)) is not None]
    return max(1, int(min([len(cpus or available_cpus()), *quotas])))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that may still be used before something is killed for it."""
    left = [free for group in _groups("memory", root) if (free := _free(group)) is not None]
    return max(0, min([psutil.virtual_memory().available, *left]))


def oom_kills(root: Path = _ROOT) -> int:
    """Processes that the system has killed for want of memory since it started, in whatever container; 0: unknown."""
    counts = dict(line.split() for line in _read(root / "proc/vmstat").splitlines())
    return int(counts.get("oom_kill", 0))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of the groups that hold this process, the innermost first; none where there are no such groups."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    for membership in memberships:
        _, controllers, group = membership.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            top, mount_point = before.split(" ")[3:5]
            kind, _, options = after.split(" ", 2)
            wanted = kind == "cgroup" and controller in options.split(",") if controllers else kind == "cgroup2"
            if wanted:
                yield from _upwards(root / mount_point.lstrip("/"), os.path.relpath(group, top))


def _upwards(mounted: Path, group: str) -> Iterator[Path]:
    """From a group to the one that is mounted, which may be the same: a container is often shown no more than its own.

    One that is told the host's name of its group all the same has it at the mount point, too.
    """
    inner = mounted / group
    if ".." in inner.parts or not inner.is_dir():
        inner = mounted
    yield from (inner, *(parent for parent in inner.parents if parent.is_relative_to(mounted)))


def _quota(group: Path) -> float | None:
    """Seconds of all cores in each second."""
    version_2 = _read(group / "cpu.max").split()
    quota, period = version_2 or (_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))
    return int(quota) / int(period) if quota.isdecimal() else None  # "max" or -1: none


def _free(group: Path) -> int | None:
    """Bytes up to the limit; pages of files that nobody used lately are given back before it is met."""
    for limit, usage, idle_files in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most = _read(group / limit)
        if most.isdecimal():
            counts = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            return int(most) - int(_read(group / usage)) + int(counts.get(idle_files, 0))
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
