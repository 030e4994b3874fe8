"""A link between two network namespaces that delays, loses or swallows packets: this kernel has no netem.

    python tests/tun_link.py NAMESPACE_A NAMESPACE_B

Makes the device `kv` in both, says so with a line, and then takes lines `DELAY_S LOSS` until its input ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import random
import struct
import sys
from collections import deque

_TUNSETIFF, _IFF_TUN_NO_PI, _CLONE_NEWNET = 0x400454CA, 0x1001, 0x40000000
_MAX_PACKET, _BATCH = 65536, 64


def open_tun(namespace: str, device: str) -> int:
    """A descriptor whose reads and writes are the packets of a new device in that namespace."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with open(f"/run/netns/{namespace}") as there, open("/proc/self/ns/net") as here:
        if setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN_NO_PI))
        setns(here.fileno(), _CLONE_NEWNET)
    return descriptor


class Link:
    """Both directions. Changing delay_s and loss takes effect with the next packet."""

    def __init__(self) -> None:
        self.delay_s = self.loss = 0.0
        self._rng = random.Random(0)

    def join(self, source: int, target: int) -> None:
        due: deque[tuple[float, bytes]] = deque()
        loop = asyncio.get_running_loop()

        def take() -> None:
            for _ in range(_BATCH):
                try:
                    packet = os.read(source, _MAX_PACKET)
                except OSError:  # nothing more, or the device is down
                    return
                if self._rng.random() < self.loss:
                    continue
                if not self.delay_s and not due:
                    give(packet)
                    continue
                due.append((loop.time() + self.delay_s, packet))
                if len(due) == 1:
                    loop.call_at(due[0][0], flush)

        def flush() -> None:
            while due and due[0][0] <= loop.time():
                give(due.popleft()[1])
            if due:
                loop.call_at(due[0][0], flush)

        def give(packet: bytes) -> None:
            try:
                os.write(target, packet)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EIO, errno.ENETDOWN):
                    raise

        loop.add_reader(source, take)


async def main(namespaces: list[str]) -> None:
    link = Link()
    a, b = (open_tun(namespace, "kv") for namespace in namespaces)
    link.join(a, b)
    link.join(b, a)
    print("up", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        link.delay_s, link.loss = map(float, line.split())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
