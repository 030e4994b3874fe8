"""Prefill and decode workers in network namespaces of their own, with a link between them that can be spoilt.

    router, bridge, Redis: the namespace of the tests
         | veth 10.N.1.0/24                  | veth 10.N.2.0/24
    prefill workers ------ kv (tun_link) ------ decode workers

The addresses of workers are those on the veths; what the two roles say to each other takes the link `kv`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Self

ROLES = ("prefill", "decode")
_numbers = itertools.count()


def why_not() -> str:
    """Why namespaces cannot be had here; empty if they can."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "network namespaces need iproute2 (ip, tc)"
    if not Path("/dev/net/tun").exists():
        return "the link needs /dev/net/tun"
    made = subprocess.run(["ip", "netns", "add", f"pw{os.getpid()}"], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    _run("ip", "netns", "del", f"pw{os.getpid()}")
    return ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Network:
    """A context manager; the link starts perfect."""

    def __init__(self) -> None:
        self._net = f"10.{random.randrange(64, 250)}"
        self._names = {role: f"pw{os.getpid()}{role[0]}{next(_numbers)}" for role in ROLES}
        self._link: subprocess.Popen[str] | None = None
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for number, (role, name) in enumerate(self._names.items(), 1):
            subnet = f"{self._net}.{number}"
            _run("ip", "netns", "add", name)
            self._closing.callback(_run, "ip", "netns", "del", name)
            _run("ip", "link", "add", f"{name}0", "type", "veth", "peer", "name", "eth0", "netns", name)
            # By itself it goes only when the last process of the namespace has.
            self._closing.callback(_run, "ip", "link", "del", f"{name}0")
            _run("ip", "addr", "add", f"{subnet}.1/24", "dev", f"{name}0")
            _run("ip", "link", "set", f"{name}0", "up")
            self._ip(role, "addr", "add", f"{subnet}.2/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip(role, "link", "set", device, "up")
            self._ip(role, "route", "add", "default", "via", f"{subnet}.1")
        self._start_link()
        return self

    def _start_link(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("tun_link.py")), *self._names.values()]
        self._link = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._closing.callback(self._link.communicate)
        self._closing.callback(self._link.kill)
        assert self._link.stdout and self._link.stdout.readline() == "up\n"
        for number, role in enumerate(ROLES, 1):
            self._ip(role, "addr", "add", f"{self._net}.3.{number}/24", "dev", "kv")
        self.up()

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _ip(self, role: str, *arguments: str) -> None:
        _run("ip", "-n", self._names[role], *arguments)

    @property
    def outside(self) -> str:
        """An address of this namespace that both roles can reach."""
        return f"{self._net}.1.1"

    def host(self, role: str) -> str:
        return f"{self._net}.{ROLES.index(role) + 1}.2"

    def enter(self, role: str) -> list[str]:
        """Goes before a command that is to run where that role lives."""
        return ["ip", "netns", "exec", self._names[role]]

    def spoil(self, delay_s: float = 0.0, loss: float = 0.0) -> None:
        """loss 1 is a partition that neither side is told of. Without arguments the link is perfect again."""
        assert self._link is not None and self._link.stdin is not None
        self._link.stdin.write(f"{delay_s} {loss}\n")
        self._link.stdin.flush()

    def limit(self, mbit: int) -> None:
        for name in self._names.values():
            rate = f"rate {mbit}mbit burst 128kb latency 50ms".split()
            _run("tc", "-n", name, "qdisc", "replace", "dev", "kv", "root", "tbf", *rate)

    def unlimit(self) -> None:
        for name in self._names.values():
            _run("tc", "-n", name, "qdisc", "del", "dev", "kv", "root")

    def up(self) -> None:
        for number, role in enumerate(ROLES, 1):
            other = ROLES[2 - number]
            self._ip(role, "link", "set", "kv", "mtu", "60000", "up")
            via = f"{self._net}.3.{3 - number}"
            self._ip(role, "route", "replace", f"{self.host(other)}/32", "via", via, "dev", "kv")

    def down(self) -> None:
        """The link is gone, and both sides know."""
        for role in ROLES:
            self._ip(role, "link", "set", "kv", "down")
