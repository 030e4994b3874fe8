"""Which hash blocks of the prefix cache peers were told of."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq


class AnnouncedBlocks:
    """stored / removed: told the hashes of hash blocks that the prefix cache gains and loses."""

    def __init__(self, stored: Callable[[Seq[bytes]], None], removed: Callable[[Seq[bytes]], None]) -> None:
        self._stored, self._removed = stored, removed
        self._known: dict[bytes, None] = {}  # parents first

    @property
    def hashes(self) -> list[bytes]:
        """Parents before children."""
        return list(self._known)

    def gained(self, keys: Seq[bytes]) -> None:
        new = [key for key in keys if key not in self._known]
        if new:
            self._known.update(dict.fromkeys(new))
            self._stored(new)

    def lost(self, key: bytes) -> None:
        if key in self._known:
            del self._known[key]
            self._removed([key])
