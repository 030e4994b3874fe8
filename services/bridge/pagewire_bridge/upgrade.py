"""Offers to go on in another protocol, which nobody takes here: their requests are answered as all others are.

Java's HttpClient makes one with every request. The parser under uvicorn takes what follows such a head for that other
protocol, and so the request's body for none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from httptools import HttpRequestParser

from pagewire_bridge.request_head import BoundedHead

_FRAMING = (b"content-length", b"transfer-encoding")


class WithoutUpgrade(BoundedHead):
    """uvicorn's protocol. After a head with an offer another parser reads on."""

    _offered = False
    _data = _rest = b""  # that the parser has got, and that it has left

    def data_received(self, data: bytes) -> None:
        self._rest = data
        while self._rest:
            self._data, self._rest = self._rest, b""
            super().data_received(self._data)
        self._data = b""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._offered = self.parser.should_upgrade()

    def on_message_complete(self) -> None:
        if not self._offered:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Called while what the parser has raised is handled, which says where the head ended."""
        offer = sys.exception()
        assert offer is not None
        self._offered, self._rest = False, self._data[offer.args[0] :]
        framing = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] in _FRAMING)
        self.parser = HttpRequestParser(_AfterHead(self))
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % framing)


class _AfterHead:
    """Hands on what a parser tells, but for the first head: it is known."""

    def __init__(self, protocol: WithoutUpgrade) -> None:
        self._protocol, self._is_known = protocol, True
        self.on_body, self.on_message_complete = protocol.on_body, protocol.on_message_complete

    def on_message_begin(self) -> None:
        self._tell(self._protocol.on_message_begin)

    def on_url(self, url: bytes) -> None:
        self._tell(self._protocol.on_url, url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._tell(self._protocol.on_header, name, value)

    def on_headers_complete(self) -> None:
        self._tell(self._protocol.on_headers_complete)
        self._is_known = False

    def _tell(self, tell: Callable[..., None], *what: bytes) -> None:
        if not self._is_known:
            tell(*what)
