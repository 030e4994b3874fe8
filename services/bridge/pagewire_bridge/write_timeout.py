"""HTTP connections whose client takes nothing: they are cut, which ends their requests as if the client had left."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios

from pagewire_bridge.upgrade import WithoutUpgrade


def http_protocol(timeout_s: float) -> type[WithoutUpgrade]:
    """uvicorn's protocol, with a limit to how long what is to be sent may stand still.

    Beyond uvicorn's 64 KiB and the kernel's buffers nothing is held for a client: its request waits for it.
    """

    class Protocol(WithoutUpgrade):
        _watch: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_from(self._unread())

        def resume_writing(self) -> None:
            self._end_watch()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_watch()
            super().connection_lost(exc)

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():  # closing would wait for a client that takes nothing
                self._cut()
            else:
                super().timeout_keep_alive_handler()

        def _watch_from(self, unread: int) -> None:
            self._watch = self.loop.call_later(timeout_s, self._judge, unread)

        def _judge(self, unread: int) -> None:
            left = self._unread()
            if left < unread:
                self._watch_from(left)
            else:
                self._cut()

        def _unread(self) -> int:
            """Bytes that the client has not acknowledged, here and in the kernel."""
            sock = self.transport.get_extra_info("socket")
            (in_kernel,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
            return self.transport.get_write_buffer_size() + in_kernel

        def _cut(self) -> None:
            """Without lingering: the kernel drops what it holds for the client, too."""
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

        def _end_watch(self) -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

    return Protocol
