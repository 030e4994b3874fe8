"""Who calls at the port of the sealed lane while it is being built: the peer, and others."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import psutil
import pytest
import torch
from pagewire_core.errors import Unavailable
from pagewire_transfer import tcp_lane
from pagewire_transfer.lanes import open_lane
from pagewire_transfer.relay_store import RelayStore
from sealed_ends import PROOF, TIMEOUT_S, chunk, exactly, opened, received, sent


def greeting() -> bytes:
    """How a caller begins who means to show a certificate, whoever signed it: the lane asks for none."""
    out = ssl.MemoryBIO()
    hello = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="worker.pagewire.internal")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    return out.read()


def test_callers_that_are_not_the_peer_are_sent_away_and_hold_nobody_up() -> None:
    """More than are listened to at once. The third has a certificate of ours and the key of another pair, no more."""
    said = (b"", None, tcp_lane._proof(os.urandom(32)), greeting(), os.urandom(PROOF - 1), os.urandom(10 * PROOF))
    strangers: list[socket.socket] = []

    def crowd(address: str) -> str:
        host, _, port = address.partition(" ")
        for i in range(120):
            stranger, words = socket.create_connection((host, int(port))), said[i % len(said)] if i % 2 else b""
            if words is None:
                stranger.close()
            elif words:
                stranger.sendall(words)
            strangers.append(stranger)
        return address

    before = psutil.Process().num_fds()
    with opened(crowd) as (sender, receiver):
        assert torch.equal(received(receiver, sent(sender, chunk(0))), chunk(0))
        for stranger in strangers:
            if stranger.fileno() >= 0:
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
                stranger.close()
    assert psutil.Process().num_fds() <= before


def test_of_callers_that_say_nothing_the_oldest_are_sent_away_before_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tcp_lane, "_MAX_CALLERS", 3)
    told = SimpleQueue[tuple[str, bytes]]()
    store = RelayStore(lambda key, value: told.put((key, value)), TIMEOUT_S)
    with ThreadPoolExecutor(1) as thread:
        listening = thread.submit(open_lane, "tcp", store, 1, "127.0.0.1", 1, TIMEOUT_S)
        addresses = (value.decode() for key, value in iter(told.get, None) if key.endswith("address"))
        host, _, port = next(addresses).partition(" ")
        strangers = [socket.create_connection((host, int(port)), timeout=10) for _ in range(4)]
        assert strangers[0].recv(1) == b""
        for stranger in strangers[1:]:
            stranger.settimeout(0.05)
            with pytest.raises(TimeoutError):
                stranger.recv(1)
        store.close()
        with pytest.raises(Unavailable, match="control stream ended"):
            listening.result()
    for stranger in strangers:
        stranger.close()


def test_a_caller_that_speaks_as_it_is_sent_away_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_lane, "_MAX_CALLERS", 1)
    strangers: list[socket.socket] = []

    def crowd(address: str) -> str:
        host, _, port = address.partition(" ")
        for _ in range(3):
            strangers.append(socket.create_connection((host, int(port))))
            strangers[-1].sendall(b"half a word")
        return address

    with opened(crowd) as (sender, receiver):
        assert torch.equal(received(receiver, sent(sender, chunk(0))), chunk(0))
    for stranger in strangers:
        stranger.close()


def test_the_port_is_open_only_while_the_pair_is_built() -> None:
    ports: list[int] = []

    def note(address: str) -> str:
        ports.append(int(address.split()[1]))
        return address

    with opened(note), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]))


def test_a_stranger_in_the_receivers_place_gets_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the address hears the proof, which opens no other lane, and nothing else."""
    monkeypatch.setattr(tcp_lane, "_BUILD_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as fake:
        address = f"127.0.0.1 {fake.getsockname()[1]}"
        with pytest.raises(Unavailable, match="tcp lane failed"), opened(lambda _: address, 2.0):
            pass
        caller, _ = fake.accept()
        with caller:
            assert len(exactly(caller, 1000)) == PROOF


def test_a_receiver_whose_key_is_none_is_not_called() -> None:
    store = RelayStore(lambda key, value: None, TIMEOUT_S)
    store.receive("epoch-1/key", b"short")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store.receive("epoch-1/address", f"127.0.0.1 {listener.getsockname()[1]}".encode())
        store.receive("epoch-1/accepted", b"yes")
        with pytest.raises(Unavailable, match="the peer's key has 5 bytes, not 32"):
            open_lane("tcp", store, 0, "127.0.0.1", 1, TIMEOUT_S)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
