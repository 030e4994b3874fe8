"""The cores that the step's threads keep to, and the file through which workers lend each other theirs; see cores.h."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path


class Cores:
    """`handle` is what the step reads, valid while this object lives.

    Without `lending`, `own` threads divide the cores among them, or go where the system puts them if there are none.
    With it there is a thread for each core: the first `own` are this worker's, of the others it uses those that
    their owners lend. Raises OSError if the file cannot be used.
    """

    def __init__(
        self, library: ctypes.CDLL, own: int, numbers: Sequence[int] = (), lending: Path | None = None
    ) -> None:
        assert len(numbers) >= own or not numbers
        self._library = library
        self._lines = _shared_memory(lending, library.pw_core_lines_bytes()) if lending else None
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._lines)) if self._lines else None
        self.handle = library.pw_cores(own, (ctypes.c_int32 * len(numbers))(*numbers), len(numbers), address)
        weakref.finalize(self, library.pw_cores_free, self.handle)

    @property
    def borrowed(self) -> int:
        """Cores of others that steps used, summed over the steps."""
        return int(self._library.pw_cores_borrowed(self.handle))

    @property
    def returned(self) -> int:
        """Of these, how many were given back in the middle of a step."""
        return int(self._library.pw_cores_returned(self.handle))

    def rest(self) -> None:
        """Nothing will be computed for a while: others may use the cores."""
        self._library.pw_cores_rest(self.handle)


def _shared_memory(path: Path, size: int) -> mmap.mmap:
    """The file's memory; a new or shorter file is filled up with zeros."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(handle).st_size < size:
            os.ftruncate(handle, size)
        return mmap.mmap(handle, size)
    finally:
        os.close(handle)
