"""The engine's block tables on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pagewire_engine.batch import Batch
from pagewire_engine.gpu.transfers import upload


class DeviceTables:
    """A copy of `Batch.tables` that is brought up to date by the rows that changed."""

    def __init__(self, device: torch.device) -> None:
        self.tables = torch.empty(0, 0, dtype=torch.int32, device=device)
        self._changed: set[int] = set()  # seats

    def update(self, batch: Batch) -> None:
        """If it fails, the next one makes up for it: the batch may tell of sequences that have no row in it."""
        self._changed.update(batch.table_changes)
        if self.tables.shape != batch.tables.shape:  # the first step, or more sequences run than ever before
            self.tables = torch.tensor(batch.tables, device=self.tables.device)
        elif self._changed:
            seats = np.array([*self._changed], np.int64)
            changed = upload({"seats": seats, "rows": batch.tables[seats]}, self.tables.device)
            self.tables.index_copy_(0, changed["seats"], changed["rows"])
        self._changed.clear()

    def rows(self, seats: Tensor, out: Tensor | None = None) -> Tensor:
        """The tables of some seats, int32 [B, max_blocks], in `out` if there is one."""
        return torch.index_select(self.tables, 0, seats, out=out)
