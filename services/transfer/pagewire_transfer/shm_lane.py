"""A lane through memory that both processes of a pair map: a ring of chunks, gathered into and scattered from.

    header: written, read (chunks so far, each with one writer) | slot 0 | slot 1 | ...

The memory has no name that could stay behind: it is a file of the decode worker's alone, which the
prefill worker opens through /proc while the pair is being built, and which cannot shrink under it. That
works between processes of one user in the same namespaces of one running kernel; `host_id` is equal
for those and no others.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from pagewire_core.errors import Unavailable

from pagewire_transfer.group_lanes import DECODE_RANK, RECV_TIMEOUT_S

# As little as lets one chunk be gathered while the one before it is scattered: all of it then stays in the processor's
# last cache, beside the pages that are on their way. A ring of 32 MiB moved chunks at a third of this one's rate.
_SLOTS, _SLOT_BYTES = 2, 4 << 20
_HEADER_BYTES = mmap.PAGESIZE
_WRITTEN, _READ = 0, 8  # cells of the header, far enough apart not to share a line of the cache
_SIZE = _HEADER_BYTES + _SLOTS * _SLOT_BYTES
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 20e-6, 1e-3


@functools.cache
def host_id() -> str:
    """Names those processes that can share memory with this one; empty where that does not work."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "user")]
        return ":".join(map(str, (boot, *namespaces, os.getuid(), os.getgid())))
    except (OSError, AttributeError):  # not Linux
        return ""


def place() -> str:
    """Names those workers that this one can share a ring with: on this host, with a ring of the same shape."""
    host = host_id()
    return f"{host}:{_SLOTS}x{_SLOT_BYTES}" if host else ""


class ShmLane:
    """Same-host memory. The decode worker makes it, the prefill worker maps it."""

    name = "shm"
    most_bytes = _SLOT_BYTES

    def __init__(self, store: dist.Store, rank: int, host: str, epoch: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._interrupted = False
        prefix = dist.PrefixStore(f"epoch-{epoch}", store)
        try:
            memory = _made(prefix) if rank == DECODE_RANK else _opened(prefix)
        except (OSError, ValueError, RuntimeError) as error:
            raise Unavailable(f"the shm lane failed: {error}") from error
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._header: torch.Tensor | None = whole[:_HEADER_BYTES].view(torch.int64)
        self._slots: torch.Tensor | None = whole[_HEADER_BYTES:].view(_SLOTS, _SLOT_BYTES)

    def staging(self, num_bytes: int) -> torch.Tensor:
        header, slots = self._memory()
        assert num_bytes <= _SLOT_BYTES
        written = int(header[_WRITTEN])
        self._wait(lambda: written - int(header[_READ]) < _SLOTS, self._timeout_s)
        return slots[written % _SLOTS, :num_bytes]

    def send(self, wire: torch.Tensor) -> bytes:
        # Filling the slot let go of the interpreter's lock and took it again, and so does reading it in `recv`: that
        # orders it before the count, also on processors which would not by themselves.
        header, _ = self._memory()
        header[_WRITTEN] += 1
        return b""

    @contextlib.contextmanager
    def recv(self, num_bytes: int, inline: bytes, next_bytes: int) -> Iterator[torch.Tensor]:
        if inline or num_bytes > _SLOT_BYTES:
            raise Unavailable(f"a chunk of {num_bytes} bytes for the shm lane came with {len(inline)} bytes of data")
        header, slots = self._memory()
        read = int(header[_READ])
        self._wait(lambda: int(header[_WRITTEN]) > read, min(self._timeout_s, RECV_TIMEOUT_S))
        yield slots[read % _SLOTS, :num_bytes]
        header[_READ] = read + 1

    def _memory(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._header is None or self._slots is None:
            raise Unavailable("the shm lane is closed")
        return self._header, self._slots

    def _wait(self, is_so: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        wait_s = _SHORTEST_WAIT_S
        while not is_so():
            if self._interrupted:
                raise Unavailable("the shm lane failed: it was interrupted")
            if time.monotonic() > deadline:
                raise Unavailable(f"the shm lane failed: the peer did nothing for {limit_s:.1f} s")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        self._header = self._slots = None  # the last reference unmaps it


def _made(store: dist.Store) -> mmap.mmap:
    """New memory, which is no longer to be found when this returns."""
    file = os.memfd_create("pagewire-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, _SIZE)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = mmap.mmap(file, _SIZE)
        store.set("file", f"{os.getpid()} {file}")
        store.get("mapped")  # waits for it
        return memory
    finally:
        os.close(file)


def _opened(store: dist.Store) -> mmap.mmap:
    """The peer's memory. Raises ValueError if it is not what a peer makes."""
    pid, number = map(int, store.get("file").split())
    file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    with contextlib.closing(os.fdopen(file, "r+b", buffering=0)):
        if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the peer's memory may shrink")
        memory = mmap.mmap(file, _SIZE)  # fails for a smaller one
    store.set("mapped", "yes")
    return memory
