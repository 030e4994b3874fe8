"""The memory through which the workers of one `pagewire serve` lend each other cores."""

from __future__ import annotations

import os
import weakref


class CoreFile:
    """Children open `path` while this object lives. It has no name on disk that could stay behind."""

    def __init__(self) -> None:
        handle = os.memfd_create("pagewire-cores")
        self.path = f"/proc/{os.getpid()}/fd/{handle}"
        weakref.finalize(self, os.close, handle)
