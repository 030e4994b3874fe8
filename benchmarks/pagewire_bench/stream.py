"""One streamed HTTP response, each piece with the time at which it came.

The load generator shares the machine with the server it measures. So a piece costs it a parse of its framing and no
more: an HTTP client of the usual kind takes as long over a piece as a fast server does over a token.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field

import httptools
import httpx


@dataclass(frozen=True)
class Piece:
    at: float  # time.perf_counter
    body: bytes


@dataclass
class Response:
    """status 0: the connection ended before one came. complete: the body ended as its framing says."""

    status: int = 0
    pieces: list[Piece] = field(default_factory=list)
    complete: bool = False


class _Receiver(asyncio.Protocol):
    """Collects a response until it or the connection ends. The `on_` methods are called by the parser."""

    def __init__(self, ended: asyncio.Future[None]) -> None:
        self.response = Response()
        self._ended = ended
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end()

    def on_headers_complete(self) -> None:
        self.response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.response.pieces.append(Piece(self._now, body))

    def on_message_complete(self) -> None:
        self.response.complete = True
        self._end()

    def connection_lost(self, _error: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


async def send(request: httpx.Request, timeout_s: float) -> Response:
    """Sends `request` on a connection of its own. Raises OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    url = request.url
    is_tls = url.scheme == "https"
    async with asyncio.timeout(timeout_s):
        transport, receiver = await loop.create_connection(
            lambda: _Receiver(ended),
            url.host,
            url.port or (443 if is_tls else 80),
            ssl=ssl.create_default_context() if is_tls else None,
        )
        try:
            transport.write(_encoded(request))
            await ended
        finally:
            transport.close()
    return receiver.response


def _encoded(request: httpx.Request) -> bytes:
    own = {b"accept-encoding": b"identity", b"connection": b"close"}
    headers = [(key, value) for key, value in request.headers.raw if key.lower() not in own] + list(own.items())
    lines = b"".join(key + b": " + value + b"\r\n" for key, value in headers)
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (request.method.encode(), request.url.raw_path, lines, request.content)
