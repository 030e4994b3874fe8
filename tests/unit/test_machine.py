"""Limits of a container are met as if the machine were that small."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pagewire_core.machine import available_cpus, available_memory, num_threads, oom_kills

GIB = 1 << 30
CPUS = tuple(range(64))

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1 = """31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"""


def made(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def memory_v1(directory: str, limit: int, usage: int, idle: int) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/memory{directory}/memory.limit_in_bytes": str(limit),
        f"sys/fs/cgroup/memory{directory}/memory.usage_in_bytes": str(usage),
        f"sys/fs/cgroup/memory{directory}/memory.stat": f"cache 5\ntotal_inactive_file {idle}",
    }


def memory_v2(directory: str, limit: int | str, usage: int, idle: int) -> dict[str, str]:
    return {
        f"sys/fs/cgroup{directory}/memory.max": str(limit),
        f"sys/fs/cgroup{directory}/memory.current": str(usage),
        f"sys/fs/cgroup{directory}/memory.stat": f"anon 5\ninactive_file {idle}",
    }


def test_a_container_of_version_2(tmp_path: Path) -> None:
    """docker run --cpus 2.5 --memory 1g: its own group is all that it sees."""
    limits = memory_v2("", GIB, 600 << 20, 100 << 20) | {"sys/fs/cgroup/cpu.max": "250000 100000"}
    root = made(tmp_path, "0::/", V2, limits)
    assert num_threads(CPUS, root) == 2
    assert available_memory(root) == GIB - (500 << 20)


def test_a_service_of_version_2_is_held_to_every_group_above_it(tmp_path: Path) -> None:
    outer, inner = "/pods.slice", "/pods.slice/pod1.scope"
    limits = memory_v2(outer, GIB, GIB // 2, 0) | memory_v2(inner, "max", GIB // 4, 0)
    limits |= {f"sys/fs/cgroup{outer}/cpu.max": "300000 100000", f"sys/fs/cgroup{inner}/cpu.max": "400000 100000"}
    root = made(tmp_path, f"0::{inner}", V2, limits)
    assert num_threads(CPUS, root) == 3
    assert available_memory(root) == GIB // 2


@pytest.mark.parametrize(
    ("top", "group"),
    [("/docker/c0ffee", "/docker/c0ffee"), ("/", "/"), ("/", "/docker/c0ffee")],
    ids=["own mount", "own names", "the host's name"],
)
def test_a_container_of_version_1(tmp_path: Path, top: str, group: str) -> None:
    cpu = "sys/fs/cgroup/cpu,cpuacct/cpu.cfs"
    limits = memory_v1("", GIB, GIB // 2, 0) | {f"{cpu}_quota_us": "400000", f"{cpu}_period_us": "100000"}
    root = made(tmp_path, f"4:memory:{group}\n1:cpu,cpuacct:{group}\n0::/", V1.format(top=top), limits)
    assert num_threads(CPUS, root) == 4
    assert available_memory(root) == GIB // 2


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    cpu = "sys/fs/cgroup/cpu,cpuacct/cpu.cfs"
    no_limits = memory_v1("", 9223372036854771712, GIB, 0) | {f"{cpu}_quota_us": "-1", f"{cpu}_period_us": "100000"}
    old = made(tmp_path / "1", "4:memory:/\n1:cpu,cpuacct:/\n0::/", V1.format(top="/"), no_limits)
    new = made(tmp_path / "2", "0::/", V2, memory_v2("", "max", GIB, 0) | {"sys/fs/cgroup/cpu.max": "max 100000"})
    for root in (old, new, tmp_path / "no Linux"):
        assert num_threads(CPUS, root) == 64 and num_threads(CPUS[:3], root) == 3
        assert available_memory(root) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_less_than_a_core_is_one_thread_and_a_full_group_has_no_memory(tmp_path: Path) -> None:
    limits = memory_v2("", GIB, GIB + 4096, 0) | {"sys/fs/cgroup/cpu.max": "50000 100000"}
    root = made(tmp_path, "0::/", V2, limits)
    assert (num_threads(CPUS, root), available_memory(root)) == (1, 0)


@pytest.fixture
def half_a_core() -> Iterator[list[Path]]:
    """A group of the kernel's with 256 MiB and half a core."""
    groups = {}
    for membership in Path("/proc/self/cgroup").read_text().splitlines():
        for controller in membership.split(":")[1].split(","):
            groups[controller] = Path(f"/sys/fs/cgroup/{controller}" + membership.split(":", 2)[2])
    made = [groups[name] / f"pagewire-{os.getpid()}" for name in ("cpu", "memory") if name in groups]
    try:
        for group in made:
            group.mkdir()
        (made[0] / "cpu.cfs_quota_us").write_text(str(int((made[0] / "cpu.cfs_period_us").read_text()) // 2))
        (made[1] / "memory.limit_in_bytes").write_text(str(256 << 20))
    except (OSError, IndexError) as error:
        pytest.skip(f"no control groups of version 1 can be made here: {error}")
    yield made
    for group in made:
        group.rmdir()


def test_the_kernels_own_groups(half_a_core: list[Path]) -> None:
    asks = "from pagewire_core import machine; print(machine.num_threads(), machine.available_memory())"
    join = " && ".join(f"echo $$ > {group}/cgroup.procs" for group in half_a_core)
    told = subprocess.run(["sh", "-c", f"{join} && exec {sys.executable} -c '{asks}'"], capture_output=True, text=True)
    threads, memory = map(int, told.stdout.split())
    assert threads == 1 <= len(available_cpus())
    assert 128 << 20 < memory < 256 << 20


def test_who_was_killed_for_want_of_memory_is_counted(tmp_path: Path) -> None:
    assert oom_kills(made(tmp_path, "", "", {"proc/vmstat": "nr_free_pages 5\noom_kill 3\nballoon_inflate 0"})) == 3
    assert oom_kills(tmp_path / "elsewhere") == 0
