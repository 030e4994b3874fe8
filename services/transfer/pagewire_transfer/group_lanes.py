"""Lanes over torch.distributed: a group of two ranks, built directly and never the world group.

Facts that shape this file (measured with Gloo): the constructor blocks until the peer arrives; a send
with no receive posted never completes; an operation that times out closes the whole group; a killed peer
ends a waiting operation at once but one in mid-transfer only at its timeout. So gRPC is the failure
detector, a broken lane is never mended, and receive timeouts are short: a chunk whose sender dies in the
middle of it keeps one thread and one staging slot for that long, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from pagewire_core.errors import Unavailable

from pagewire_transfer.relay_store import RelayStore
from pagewire_transfer.reused import Reused
from pagewire_transfer.wire import MAX_CHUNK_BYTES

PREFILL_RANK = 0
DECODE_RANK = 1

# An announced chunk is sent at once, so its receive has no reason to take longer. A send may wait for
# the peer's pages as long as any transfer may stand still.
RECV_TIMEOUT_S = 5.0
# Both sides are there when the group is built; a peer killed just then is retried until this ends.
_BUILD_TIMEOUT_S = 5.0
_DATA_TAG = 0
_INTERRUPT_TAG = 1


class _Sending:
    """A piece of staging memory and the operation that sends it, if one does."""

    def __init__(self) -> None:
        self.memory = Reused()
        self.work: Any = None


class _GroupLane:
    """What the process groups share. Raises Unavailable for every failure of the group.

    Two chunks are on their way at a time: while one is gathered or verified the other travels. One at a time, each
    with new memory, had half the speed (1.1 of 2.6 GB/s for Gloo with chunks of 4 MB, beside 2.2 of a TCP socket).
    """

    name: str
    most_bytes = 4 << 20
    _device: ClassVar[str]

    def __init__(self, store: RelayStore, rank: int, host: str, epoch: int, timeout_s: float) -> None:
        self._peer = 1 - rank
        self._send_timeout = timedelta(seconds=timeout_s)
        self._recv_timeout = timedelta(seconds=min(timeout_s, RECV_TIMEOUT_S))
        self._busy = False
        self._sending = deque([_Sending(), _Sending()])  # the next to be used first
        self._memory = deque([Reused(self._device), Reused(self._device)])  # of receives, likewise
        self._coming: deque[tuple[torch.Tensor, Any]] = deque()  # receives that have begun
        # A prefix that names the epoch: nobody may connect to the address of an earlier life.
        prefix = dist.PrefixStore(f"epoch-{epoch}", store)
        with self._operation():
            self._group: Any = self._build(prefix, rank, host, timedelta(seconds=min(timeout_s, _BUILD_TIMEOUT_S)))

    def _build(self, store: dist.Store, rank: int, host: str, timeout: timedelta) -> Any:
        raise NotImplementedError

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        except RuntimeError as error:
            raise Unavailable(f"the {self.name} lane failed: {self._reason(error)}") from error
        finally:
            self._busy = False

    def _reason(self, error: RuntimeError) -> str:
        return str(error).splitlines()[0]

    def staging(self, num_bytes: int) -> torch.Tensor:
        sending = self._sending[0]
        if sending.work is not None:
            work, sending.work = sending.work, None
            with self._operation():
                work.wait(self._send_timeout)
        return sending.memory.take(num_bytes)

    def send(self, wire: torch.Tensor) -> bytes:
        with self._operation():
            self._sending[0].work = self._group.send([wire.to(self._device)], self._peer, _DATA_TAG)
        self._sending.rotate()
        return b""

    @contextlib.contextmanager
    def recv(self, num_bytes: int, inline: bytes, next_bytes: int) -> Iterator[torch.Tensor]:
        if inline:
            raise Unavailable(f"a chunk for the {self.name} lane came with {len(inline)} bytes of data")
        with self._operation():
            if not self._coming:
                self._begin_recv(num_bytes)
            if next_bytes:
                self._begin_recv(next_bytes)
            wire, work = self._coming.popleft()
            work.wait(self._recv_timeout)
        yield wire[:num_bytes].cpu()

    def _begin_recv(self, num_bytes: int) -> None:
        self._memory.rotate()  # the newer piece may hold what is being verified
        wire = self._memory[0].take(self._room_for(num_bytes))
        self._coming.append((wire, self._group.recv([wire], self._peer, _DATA_TAG)))

    def _room_for(self, num_bytes: int) -> int:
        """Of the memory that a chunk is received into."""
        return num_bytes

    @property
    def _is_waiting(self) -> bool:
        """For something that may never come; a send that nobody waits for yet has probably been done."""
        return self._busy or bool(self._coming)

    def interrupt(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._group = None
        self._coming.clear()
        self._sending.clear()


class GlooLane(_GroupLane):
    """TCP between the hosts' CPUs."""

    name = "gloo"
    most_bytes = MAX_CHUNK_BYTES  # a message costs some 0.3 ms, however large it is
    _device = "cpu"

    def _build(self, store: dist.Store, rank: int, host: str, timeout: timedelta) -> dist.ProcessGroupGloo:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # By address, not by name: works without DNS and never picks another interface.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timeout
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def _room_for(self, num_bytes: int) -> int:
        """For any chunk: Gloo ends the process when more arrives than there is room for, and a peer that announces
        other chunks than it sends must not be able to do that. The checksum tells them apart.
        """
        return MAX_CHUNK_BYTES

    def interrupt(self) -> None:
        group = getattr(self, "_group", None)
        if group is not None and self._is_waiting:
            # Gloo has no cancel; a timeout of any operation closes the pair and ends the waiting ones.
            with contextlib.suppress(RuntimeError):
                probe = group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, _INTERRUPT_TAG)
                probe.wait(timedelta(milliseconds=1))


class NcclLane(_GroupLane):
    """Between two GPUs; chunks are copied to and from the device at either end."""

    name = "nccl"
    _device = "cuda"

    def _build(self, store: dist.Store, rank: int, host: str, timeout: timedelta) -> Any:
        # Without it a watchdog ends the whole process when an operation fails or takes longer than `timeout`. Read when
        # a group is made: those of a tensor-parallel worker's ranks, which must not block, are older than any lane.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, 2, options)
        try:
            self._connect(group, rank, timeout)
        except RuntimeError:
            _abort(group)
            raise
        return group

    def _connect(self, group: Any, rank: int, timeout: timedelta) -> None:
        """NCCL connects two ranks in their first operation, where each waits for the other. With the first chunk they
        would wait for ever: it is received when it has been announced, and announced when it has been sent.
        """
        byte = [torch.zeros(1, dtype=torch.uint8, device=self._device)]
        first = group.send if rank == PREFILL_RANK else group.recv
        first(byte, self._peer, _DATA_TAG).wait(timeout)

    def _reason(self, error: RuntimeError) -> str:
        """Between where it happened and what it was are lines of advice."""
        lines = [line for line in str(error).splitlines() if line]
        return ": ".join(dict.fromkeys((lines[0], lines[-1])))

    def send(self, wire: torch.Tensor) -> bytes:
        super().send(wire)
        torch.cuda.current_stream().synchronize()
        return b""

    def interrupt(self) -> None:
        group = getattr(self, "_group", None)
        if group is not None and self._is_waiting:
            # On a thread of its own: it waits until the kernels have ended.
            threading.Thread(target=_abort, args=(group,), name="kv-lane-abort", daemon=True).start()

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            _abort(group)
        super().close()


def _abort(group: Any) -> None:
    """Ends the group's operations and gives back what it has on the device; again has no effect."""
    with contextlib.suppress(RuntimeError):
        group.abort()
