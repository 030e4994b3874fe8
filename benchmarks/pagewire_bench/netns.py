"""Two network namespaces with a link of a given rate between them, for as long as they are needed. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

_ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"no {' and no '.join(missing)} (iproute2)" if missing else ""


@contextlib.contextmanager
def linked(gbit_per_s: float) -> Iterator[tuple[str, str]]:
    """Names of the namespaces, whose addresses are 10.77.0.1 and 10.77.0.2; a token bucket holds each direction."""
    names = tuple(f"pagewire-{os.getpid()}-{end}" for end in "ab")
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", names[0], "link", "add", "pw0", "type", "veth", "peer", "name", "pw0", "netns", names[1])
        for name, address in zip(names, _ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "pw0")
            _run("ip", "-n", name, "link", "set", "pw0", "up")
            burst = int(gbit_per_s * 1e9 / 8 / 250)  # what a tick of 4 ms may let through
            rate = f"{int(gbit_per_s * 1000)}mbit"
            _run("tc", "-n", name, "qdisc", "add", "dev", "pw0", "root", "tbf", "rate", rate, "burst", str(burst),
                 "latency", "50ms")  # fmt: skip
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
