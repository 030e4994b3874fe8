"""Server-sent events: framing, and the response that sends them until the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagewire_bridge.disconnect import ClientGone, until_disconnect
from pagewire_bridge.json_line import json_line

DONE = b"data: [DONE]\n\n"
PING_S = 10.0  # of silence, at least; clients and proxies give up after 60 and more


def event(data: Mapping[str, object], name: str = "") -> bytes:
    """One event, of that name if it has one."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + json_line(data) + b"\n\n"


class EventStream(Response):
    """Sends encoded events as they come; runs `close` at the end, whatever the end was.

    ping: is sent while there are none, as when a long prompt is computed; empty: nothing is.
    Sets scope["state"]["client_gone"] when the client left before the end.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
        media_type: str = "text/event-stream",
        ping: bytes = b"",
    ) -> None:
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self._events = events
        self._close = close
        self._ping = ping
        self._is_silent = True  # since the last look
        # no-cache and X-Accel-Buffering: a proxy between us and the client must not hold events back.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except ClientGone:
            scope["state"]["client_gone"] = True
        finally:
            await self._events.aclose()
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = asyncio.create_task(self._send_pings(send)) if self._ping else None
        try:
            async for data in self._events:
                self._is_silent = False
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            if pings:
                pings.cancel()
                await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pings(self, send: Send) -> None:
        while True:
            self._is_silent = True
            await asyncio.sleep(PING_S)
            if self._is_silent:
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})
