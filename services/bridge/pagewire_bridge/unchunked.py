"""Answers to HTTP/1.0, which knows no chunks and no `100 Continue`: uvicorn sends them to all.

A stream ends where its connection does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope


class Unchunked(HttpToolsProtocol):
    """uvicorn's protocol. It closes the connection of such a client after the answer, whatever that is."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if cycle.scope["http_version"] == "1.0":
            cycle.waiting_for_100_continue = False
            app = _unchunked(cycle, app)
        super()._start_asgi_task(cycle, app)


def _unchunked(cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
    async def send(message: ASGISendEvent) -> None:
        """Without chunks uvicorn expects as many bytes as were declared: here, as many as there are."""
        body = message.get("body", b"") if message["type"] == "http.response.body" else b""
        cycle.chunked_encoding, cycle.expected_content_length = False, len(body)
        await cycle.send(message)

    async def run(scope: Scope, receive: ASGIReceiveCallable, _send: ASGISendCallable) -> None:
        await app(scope, receive, send)

    return run
