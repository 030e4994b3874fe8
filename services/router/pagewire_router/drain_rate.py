"""How fast a queue empties, measured while somebody waits in it."""

from __future__ import annotations

_KEEP = 0.9  # of the past with every departure: about the last ten count
_MIN_SECONDS = 1e-3  # several may go at one moment


class DrainRate:
    """Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since: float | None = None  # the last departure, or when somebody began to wait

    def waits(self, now: float) -> None:
        """Somebody waits; the clock runs from now on, if it does not run yet."""
        if self._since is None:
            self._since = now

    def left(self, tokens: int, now: float) -> None:
        """One that waited has gone."""
        self.waits(now)
        assert self._since is not None
        self._tokens = _KEEP * self._tokens + tokens
        self._seconds = _KEEP * self._seconds + max(now - self._since, _MIN_SECONDS)
        self._since = now

    def empty(self) -> None:
        """Nobody waits: time that passes now says nothing, nor what held up those before of those who come next."""
        self._tokens = self._seconds = 0.0
        self._since = None

    def seconds_for(self, tokens: int, now: float) -> float | None:
        """How long so many tokens take to leave; None while nothing has left since the queue was empty.

        A queue that stands still slows.
        """
        if not self._tokens:
            return None
        stands_s = now - self._since if self._since is not None else 0.0
        return tokens * max(self._seconds / self._tokens, (_KEEP * self._seconds + stands_s) / self._tokens)
