"""One HTTP request, each piece of its response with the time at which it came.

The load generator shares the machine with the server it measures. So a piece costs it a parse of its framing and no
more: an HTTP client of the usual kind takes as long over a piece as a fast server does over a token.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

TIMEOUT_S = 600.0  # of a request


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

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def body(self) -> bytes:
        return b"".join(piece.body for piece in self.pieces)

    @property
    def refusal(self) -> str:
        """What it says, where it is not ok."""
        return f"the server answers {self.status}: {self.body[:300].decode(errors='replace')}"

    def json(self) -> Any:
        """The body, or None if it is no JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None


@dataclass(frozen=True)
class Server:
    """Where a server is, and what every request to it carries. A connection for each request."""

    base_url: str  # with or without /v1 at its end
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """A request as it is sent; `body` as JSON."""
        url = urlsplit(self.base_url.rstrip("/").removesuffix("/v1"))
        content = b"" if body is None else orjson.dumps(body)
        headers = {
            "host": url.netloc.rpartition("@")[2],
            "accept-encoding": "identity",
            "connection": "close",
            "content-type": "application/json",
            "content-length": str(len(content)),
            **self.headers,
        }
        lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
        return f"{method} {url.path}{path} HTTP/1.1\r\n{lines}\r\n".encode() + content

    async def send(self, request: bytes, timeout_s: float = TIMEOUT_S) -> Response:
        """Raises OSError, of which TimeoutError is one."""
        url = urlsplit(self.base_url)
        is_tls = url.scheme == "https"
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(timeout_s):
            transport, receiver = await asyncio.get_running_loop().create_connection(
                lambda: _Receiver(ended),
                url.hostname or "",
                url.port or (443 if is_tls else 80),
                ssl=_trusted() if is_tls else None,
            )
            try:
                transport.write(request)
                await ended
            finally:
                transport.close()
        return receiver.response

    async def get(self, path: str) -> Response:
        """An empty response where nothing answers."""
        try:
            return await self.send(self.request("GET", path))
        except OSError:
            return Response()


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The system's authorities, and those of SSL_CERT_FILE."""
    return ssl.create_default_context()


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
