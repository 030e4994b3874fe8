"""The block tables of running sequences as one array that lives as long as the engine.

A step's batch refers to rows of it by number; nothing is copied for a sequence whose blocks did not change.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np


class Seats:
    """tables: int32 [seats, max_blocks], C-contiguous, one row ("seat") per running sequence.

    `tables` is replaced by a larger array when more sequences run than it has rows; a batch that holds the
    old one keeps valid rows. Cells behind a sequence's last block hold any valid block number.
    """

    def __init__(self, num_seats: int, max_blocks: int) -> None:
        self.tables = np.zeros((num_seats, max_blocks), np.int32)
        self._free = list(range(num_seats - 1, -1, -1))
        self._changed: set[int] = set()

    @property
    def num_taken(self) -> int:
        return len(self.tables) - len(self._free)

    def take(self, blocks: Seq[int]) -> int:
        """A seat whose row begins with `blocks`."""
        if not self._free:
            self._double()
        seat = self._free.pop()
        self.tables[seat, : len(blocks)] = blocks
        self._changed.add(seat)
        return seat

    def put(self, seat: int, index: int, blocks: Seq[int]) -> None:
        """Writes cells [index, index + len(blocks)) of a row."""
        self.tables[seat, index : index + len(blocks)] = blocks
        self._changed.add(seat)

    def leave(self, seat: int) -> None:
        self._free.append(seat)

    def changes(self) -> tuple[int, ...]:
        """Seats whose row changed since the last call."""
        changed = tuple(self._changed)
        self._changed.clear()
        return changed

    def _double(self) -> None:
        rows = len(self.tables)
        self._free.extend(range(2 * rows - 1, rows - 1, -1))
        self.tables = np.concatenate([self.tables, np.zeros_like(self.tables)])
