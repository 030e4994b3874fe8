"""Where others reach a service that listens on all addresses, as containers do."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from pagewire_core.errors import StartupError

_REDIS_PORT = 6379


def announced_host(host: str, redis_url: str | None) -> str:
    """`host`, or in place of 0.0.0.0 and :: the address that this machine has on the way to Redis.

    An IPv6 address has no brackets: lanes listen on it. Raises StartupError if that cannot be told.
    """
    if not _means_all(host):
        return host.strip("[]")
    parts = urlsplit(redis_url or "")
    if not parts.hostname:
        raise StartupError(f"--host {host} is no address that others can dial; give the one that they are to use")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            parts.hostname, parts.port or _REDIS_PORT, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only chooses the way
            found: str = probe.getsockname()[0]
    except OSError as error:
        raise StartupError(f"--host {host}: no way to {parts.hostname} ({error.strerror}); give an address") from None
    return found


def address_of(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets, whether or not it has come with them."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


def _means_all(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False
