"""What comes before a request's body, bounded: the parser under uvicorn takes heads of any size, for any time."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from pagewire_bridge.openai.errors import http_error_response
from pagewire_bridge.pipelining import Pipelining

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
MAX_URL_BYTES = 16 << 10
HEAD_S = 30.0  # for a whole head to arrive
_LINGER_S = 1.0  # for a refusal to be read by a client that still sends, or a goodbye by an idle one


class _Refused(Exception):
    """Ends the parser's work."""


class BoundedHead(Pipelining):
    """uvicorn's protocol. A head that is too large, too slow or malformed gets an OpenAI error and the end."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _num_heads = 0  # that were complete
    _refused = False
    _partial = 0  # bytes that came while the head was not complete
    _refusal = 400, "The request is not valid HTTP."

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops. An idle client would be waited for: with TLS a close is over when it has answered it."""
        super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(_LINGER_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head and self._timer is None:
            self._await_head()
        within_head, num_heads = self._in_head, self._num_heads
        super().data_received(data)
        if within_head and self._num_heads == num_heads and not self._refused:
            self._partial += len(data)
            if self._partial > MAX_HEAD_BYTES:
                self._refuse(431, f"The headers are larger than {MAX_HEAD_BYTES >> 10} KiB.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._stop(414, f"The URL is longer than {MAX_URL_BYTES} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS:
            self._stop(431, f"There are more than {MAX_HEADERS} headers.")
        if self._head_bytes > MAX_HEAD_BYTES:
            self._stop(431, f"The headers are larger than {MAX_HEAD_BYTES >> 10} KiB.")

    def on_headers_complete(self) -> None:
        self._end_timer()
        super()._unset_keepalive_if_required()
        self._in_head, self._partial = False, 0
        self._num_heads += 1
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True  # whatever follows begins another
        super().on_message_complete()

    def _unset_keepalive_if_required(self) -> None:
        """What is left of a body after the answer is no request: it does not prolong the connection's time."""
        if self._in_head:
            super()._unset_keepalive_if_required()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*self._refusal)

    def _stop(self, status: int, message: str) -> None:
        """Called by the parser, which hands an exception on as its own error, which ends in send_400_response."""
        self._refusal = status, message
        raise _Refused

    def _refuse(self, status: int, message: str) -> None:
        self._refused = True
        self._end_timer()
        if self._answered is not None and self._answered.response_started and self.answering:
            return self.transport.abort()  # what is said now would be a part of that answer
        self.transport.write(_whole(http_error_response(status, message, None)))
        # Closing at once would throw away what the client has not read yet, as more of its bytes are on the way.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _too_slow(self) -> None:
        if self.answering:  # as when a client ends its body with a line of its own: nothing need follow
            return self._await_head()
        self._refuse(408, f"The headers did not come within {HEAD_S:.0f} s.")

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _whole(response: Response) -> bytes:
    head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return STATUS_LINE[response.status_code] + head + b"connection: close\r\n\r\n" + bytes(response.body)
