"""Connections on which a request comes before the one before it is answered: uvicorn tells the last of them alone that
the client has left, and reads no more, so that it does not notice it either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pagewire_bridge.unchunked import Unchunked

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application


class Pipelining(Unchunked):
    """uvicorn's protocol. A client that leaves ends the request that is answered, and those that wait behind it."""

    _answered: RequestResponseCycle | None = None  # now, or last

    @property
    def answering(self) -> bool:
        """Whether there is a request whose answer is not complete."""
        return self._answered is not None and not self._answered.response_complete

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if len(self.pipeline) == 1:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.pipeline.clear()
        super().connection_lost(exc)
        if self._answered is not None and self.answering:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)
