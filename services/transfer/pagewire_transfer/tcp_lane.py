"""A lane between hosts that nobody but the two peers can read or write: one TCP connection, chunks sealed with AES-GCM.

The decode worker listens, on a port that is open only while the pair is being built, and tells where over the
control stream, with a key made for this life of the pair. The prefill worker connects and shows that it knows the
key; other callers are sent away. From then on

    socket           ciphertext of chunk 0, of chunk 1, ... without framing: their sizes are announced
    control stream   Chunk: transfer, seq, range, and in Chunk.data the tag of its ciphertext

The key and the tags travel on the stream that mutual TLS protects, and the nonce is the chunk's number on this lane.
So bytes that were altered, replayed, left out, put in or exchanged fail at the first chunk they touch, and end the
pair. torch.distributed offers nothing like it: its Gloo has no TLS, takes the first caller for the peer, and lets
that one end the process (docs/decisions/0016).
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pagewire_core.errors import Unavailable

from pagewire_transfer.group_lanes import DECODE_RANK, RECV_TIMEOUT_S
from pagewire_transfer.reused import Reused

_KEY_BYTES = 32
_TAG_BYTES = 16
_BUILD_TIMEOUT_S = 5.0
_BUFFER_BYTES = 4 << 20  # of the kernel, so that a chunk travels while the next is gathered or verified
_LOOK_EVERY_S = 0.1  # whether the peer is still there to come
_MAX_CALLERS = 64  # that have connected and not yet shown that they are the peer


class TcpLane:
    """Sealing a gigabyte costs about 0.3 s of one core at either end, outside the interpreter's lock.

    A thread of the lane's own moves bytes, so that one chunk travels while another is gathered or verified, and so
    that a chunk may be announced before the peer takes it.
    """

    name = "tcp"
    most_bytes = 4 << 20  # of prompts that make only one or two of 8 MiB less of the sealing would overlap

    def __init__(self, store: dist.Store, rank: int, host: str, epoch: int, timeout_s: float) -> None:
        self._plain = Reused()
        self._sealed = deque([Reused(), Reused()])  # the older first
        self._moving: deque[tuple[torch.Tensor, Future[None]]] = deque()  # what travels into or out of them
        self._num_chunks = 0
        prefix = dist.PrefixStore(f"epoch-{epoch}", store)
        build_s = min(timeout_s, _BUILD_TIMEOUT_S)
        try:
            key, self._socket = _accepted(prefix, host, build_s) if rank == DECODE_RANK else _connected(prefix, build_s)
        except (OSError, ValueError, RuntimeError) as error:
            raise Unavailable(f"the tcp lane failed: {error}") from error
        self._cipher = AESGCM(key)
        self._socket.setblocking(True)
        _limit(self._socket, socket.SO_SNDTIMEO, timeout_s)
        _limit(self._socket, socket.SO_RCVTIMEO, min(timeout_s, RECV_TIMEOUT_S))
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="kv-lane-tcp")

    def staging(self, num_bytes: int) -> torch.Tensor:
        return self._plain.take(num_bytes)

    def send(self, wire: torch.Tensor) -> bytes:
        while len(self._moving) >= len(self._sealed):
            self._moving.popleft()[1].result()
        size = wire.numel()
        sealed = self._take_sealed(size)
        self._cipher.encrypt_into(self._nonce(), _bytes(wire), None, _bytes(sealed))
        self._move(_send_all, sealed, size)
        return bytes(_bytes(sealed[size:]))

    @contextlib.contextmanager
    def recv(self, num_bytes: int, inline: bytes, next_bytes: int) -> Iterator[torch.Tensor]:
        if len(inline) != _TAG_BYTES:
            raise Unavailable(f"a chunk of {num_bytes} bytes for the tcp lane came with {len(inline)} bytes of data")
        for size in (num_bytes, next_bytes)[len(self._moving) :]:
            if size:
                self._move(_fill, self._take_sealed(size), size)
        sealed, moving = self._moving.popleft()
        assert len(sealed) == num_bytes + _TAG_BYTES
        moving.result()
        _bytes(sealed)[num_bytes:] = inline
        wire = self._plain.take(num_bytes)
        try:
            self._cipher.decrypt_into(self._nonce(), _bytes(sealed), None, _bytes(wire))
        except InvalidTag:
            raise Unavailable("the tcp lane failed: the bytes are not those that the peer sealed") from None
        yield wire

    def _take_sealed(self, size: int) -> torch.Tensor:
        """Room for the ciphertext of a chunk, and its tag."""
        self._sealed.rotate()
        return self._sealed[0].take(size + _TAG_BYTES)

    def _nonce(self) -> bytes:
        self._num_chunks += 1
        return self._num_chunks.to_bytes(12, "big")

    def _move(self, move: Callable[[socket.socket, memoryview], None], sealed: torch.Tensor, size: int) -> None:
        self._moving.append((sealed, self._mover.submit(self._moved, move, _bytes(sealed)[:size])))

    def _moved(self, move: Callable[[socket.socket, memoryview], None], part: memoryview) -> None:
        try:
            move(self._socket, part)
        except BlockingIOError:
            raise Unavailable("the tcp lane failed: the peer did nothing for too long") from None
        except OSError as error:
            raise Unavailable(f"the tcp lane failed: {error}") from error

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.interrupt()
        self._mover.shutdown()
        self._socket.close()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def _accepted(store: dist.Store, host: str, limit_s: float) -> tuple[bytes, socket.socket]:
    """The decode side: listens until the peer has come."""
    key = secrets.token_bytes(_KEY_BYTES)
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, 0), family=family) as listener:
        # Inherited by what it accepts; on the connection itself it would be too late for the window's scale.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        listener.setblocking(False)
        store.set("key", key)  # type: ignore[arg-type] # bytes are taken as they are
        store.set("address", f"{host} {listener.getsockname()[1]}")
        connection = _peer_among_callers(listener, _proof(key), limit_s, store)
    try:
        store.set("accepted", "yes")
    except BaseException:
        connection.close()
        raise
    return key, connection


def _connected(store: dist.Store, limit_s: float) -> tuple[bytes, socket.socket]:
    """The prefill side."""
    key = bytes(store.get("key"))
    if len(key) != _KEY_BYTES:
        raise ValueError(f"the peer's key has {len(key)} bytes, not {_KEY_BYTES}")
    host, _, port = bytes(store.get("address")).decode().rpartition(" ")
    connection = socket.create_connection((host, int(port)), timeout=limit_s)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(_proof(key))
        store.get("accepted")  # waits for it
    except BaseException:
        connection.close()
        raise
    return key, connection


def _proof(key: bytes) -> bytes:
    """What only a holder of the key can say; the key is of one connection, so it cannot have been heard before."""
    return hmac.digest(key, b"pagewire tcp lane", "sha256")


def _peer_among_callers(listener: socket.socket, proof: bytes, limit_s: float, store: dist.Store) -> socket.socket:
    """The first caller that shows the proof. One that says something else, or nothing, does not hold up the others.

    Raises TimeoutError, and RuntimeError when the store has been closed.
    """
    deadline = time.monotonic() + limit_s
    heard: dict[socket.socket, bytes] = {}  # in the order of their coming
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                store.check(["accepted"])
                for ready, _ in selector.select(min(left_s, _LOOK_EVERY_S)):
                    caller = ready.fileobj
                    assert isinstance(caller, socket.socket)
                    if caller is listener:
                        _take_caller(listener, selector, heard)
                    elif _hear(caller, heard, len(proof)):
                        if hmac.compare_digest(heard[caller], proof):
                            del heard[caller]
                            return caller
                        _send_away(caller, selector, heard)
        finally:
            for caller in heard:
                caller.close()
    raise TimeoutError(f"the peer did not connect within {limit_s:.1f} s")


def _take_caller(listener: socket.socket, selector: selectors.BaseSelector, heard: dict[socket.socket, bytes]) -> None:
    try:
        caller, _ = listener.accept()
    except OSError:  # it has gone again
        return
    caller.setblocking(False)
    selector.register(caller, selectors.EVENT_READ)
    heard[caller] = b""
    if len(heard) > _MAX_CALLERS:
        _send_away(next(iter(heard)), selector, heard)


def _hear(caller: socket.socket, heard: dict[socket.socket, bytes], length: int) -> bool:
    """Whether the caller has said all it may say."""
    if caller not in heard:  # sent away a moment ago
        return False
    try:
        words = caller.recv(length - len(heard[caller]))
    except OSError:
        words = b""
    heard[caller] += words
    return not words or len(heard[caller]) == length


def _send_away(caller: socket.socket, selector: selectors.BaseSelector, heard: dict[socket.socket, bytes]) -> None:
    selector.unregister(caller)
    del heard[caller]
    caller.close()


def _limit(connection: socket.socket, option: int, seconds: float) -> None:
    """How long one call may take. Not settimeout: with it a read of a whole chunk is hundreds of calls."""
    connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def _send_all(connection: socket.socket, part: memoryview) -> None:
    connection.sendall(part)


def _fill(connection: socket.socket, buffer: memoryview) -> None:
    while buffer:
        count = connection.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
        if not count:
            raise ConnectionResetError("the peer has closed the connection")
        buffer = buffer[count:]
