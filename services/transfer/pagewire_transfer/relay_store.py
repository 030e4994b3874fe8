"""A torch.distributed store between exactly two peers, carried by their control stream.

A process group of two ranks needs a store only to swap addresses (Gloo) or an id (NCCL): one `set` on
each side. Carrying those over the stream that the peers already share needs no other port, and the keys
die with the stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from pagewire_core.errors import Incompatible
from torch.distributed import Store

_MAX_PAIRS = 16  # of two peers
_MAX_PAIR_BYTES = 4096


class RelayStore(Store):
    """`put` delivers a pair to the peer, whose `receive` takes it. Blocking calls run on a lane thread."""

    def __init__(self, put: Callable[[str, bytes], None], timeout_s: float, most_pairs: int = _MAX_PAIRS) -> None:
        super().__init__()
        self._put, self._most_pairs = put, most_pairs
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def receive(self, key: str, value: bytes) -> None:
        """A pair that the peer has set. Raises Incompatible for more than any lane needs."""
        with self._changed:
            if len(self._values) >= self._most_pairs or len(key) + len(value) > _MAX_PAIR_BYTES:
                raise Incompatible("the peer puts more into the store than a lane needs")
            self._values[key] = value
            self._changed.notify_all()

    def close(self) -> None:
        """Ends every wait for what has not come, now and later, with an error. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.receive(key, data)
        self._put(key, data)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: Sequence[str]) -> bool:
        """Raises RuntimeError when they are not there and never will be."""
        here = all(key in self._values for key in keys)
        if self._closed and not here:
            raise RuntimeError("the control stream ended before the pair was up")
        return here

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Raises RuntimeError when the keys do not come in time or the stream has ended."""
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + limit_s
        with self._changed:
            while not self.check(keys):
                if not self._changed.wait(deadline - time.monotonic()):
                    raise RuntimeError(f"the peer did not join the pair within {limit_s:.1f} s")
