"""TCP ports for the services of one machine."""

from __future__ import annotations

import errno
import random
import socket

from pagewire_core.errors import StartupError

# Below the kernels' ephemeral ranges (Linux: from 32768), so that no outgoing connection takes a
# service's port between its death and its restart.
_FIRST, _LAST = 20000, 32000
_LOOPBACK_S = 2.0


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Raises OSError if `host` is not an address of this machine."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def free_ports(count: int) -> list[int]:
    """Distinct ports on loopback that nothing listens on."""
    chosen: list[int] = []
    for port in random.SystemRandom().sample(range(_FIRST, _LAST), _LAST - _FIRST):
        if len(chosen) == count:
            return chosen
        if is_free("127.0.0.1", port):
            chosen.append(port)
    raise StartupError(f"fewer than {count} ports are free between {_FIRST} and {_LAST}; stop some servers")


def require_loopback() -> None:
    """Raises StartupError where nobody can be reached on loopback: in a new network namespace it is down."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_S).close()
    except OSError as error:
        raise StartupError(
            f"the services talk over 127.0.0.1, which cannot be reached: {error.strerror or error}; bring loopback up, "
            "as with `ip link set lo up`"
        ) from None


def require_free(host: str, port: int) -> None:
    """Raises StartupError unless a server could listen on host:port."""
    try:
        free = is_free(host, port)
    except OSError as error:
        raise StartupError(f"cannot listen on {host}: {error.strerror}; choose another --host") from None
    if not free:
        raise StartupError(
            f"port {port} on {host} is in use or not allowed; stop what listens there or choose another with --port"
        )
