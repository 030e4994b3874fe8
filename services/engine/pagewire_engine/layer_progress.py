"""How far a step is while it runs: the layers whose KV is final, for transfers that do not wait for the others.

The step itself must not wait for the interpreter: it stores a number and, now and then, writes a byte into a pipe,
which wakes whoever reads the number.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable

import numpy as np

_LAYER_BITS = 16


class LayerProgress:
    """One writer, the step in flight; one reader. `cell` is `step << 16 | layers`, stored at once."""

    def __init__(self) -> None:
        self.cell = np.zeros(1, np.int64)
        self._reading, self.writing = os.pipe()
        for end in (self._reading, self.writing):
            os.set_blocking(end, False)
            weakref.finalize(self, os.close, end)

    def fileno(self) -> int:
        """Becomes readable when there is something new."""
        return self._reading

    def begin(self, step: int) -> None:
        """A step is launched, of which no layer is final."""
        self.cell[0] = step << _LAYER_BITS

    def of(self, step: int, group: int) -> Callable[[int], None]:
        """To be called with the number of layers that are final, after each; compiled steps do so themselves."""
        if not group:
            return lambda layers: None
        self.begin(step)

        def tell(layers: int) -> None:
            self.cell[0] = step << _LAYER_BITS | layers
            if layers % group == 0:
                with contextlib.suppress(BlockingIOError):  # the reader has been told often enough
                    os.write(self.writing, b"\0")

        return tell

    def read(self) -> tuple[int, int]:
        """The number of the latest step and its final layers; waits for the next news from now on."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._reading, 4096)) == 4096:
                pass
        value = int(self.cell[0])
        return value >> _LAYER_BITS, value & (1 << _LAYER_BITS) - 1
