"""What the edge is: the one description that Envoy's configuration is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From host:port or [host]:port. Raises ValueError."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{text!r} is not an address; write host:port")
        return cls(host.strip("[]"), int(port))


@dataclass(frozen=True)
class Certificate:
    """Paths of a PEM certificate (chain) and its key, where Envoy runs."""

    cert: str
    key: str


@dataclass(frozen=True)
class InternalTls:
    """Envoy's own certificate, which names it `client.pagewire.internal`, and the authority of all services."""

    certificate: Certificate
    ca: str


@dataclass(frozen=True)
class Edge:
    """Bridges behind an HTTP port and, if there are routers, their native API behind a gRPC port.

    Host names are resolved again and again, and all their addresses are used.
    """

    bridges: tuple[Address, ...]
    routers: tuple[Address, ...] = ()
    host: str = "0.0.0.0"
    http_port: int = 8000
    grpc_port: int = 9000
    metrics_port: int = 9902  # /ready and /stats/prometheus alone
    admin_port: int = 9901  # on loopback: whoever reaches it can end Envoy
    certificate: Certificate | None = None  # that clients see; without one, plain text
    client_ca: str | None = None  # authorities of clients; the gRPC port then asks for a certificate
    http_client_certificates: Literal["ignored", "checked", "required"] = "ignored"
    internal: InternalTls | None = None  # mutual TLS towards bridges and routers
    allowed_origins: tuple[str, ...] = ()  # whose web pages may use gRPC-Web
    max_request_bytes: int = 32 << 20  # as the bridge
    request_timeout_s: float = 600.0  # as the router; nothing may stand still for longer
    max_connections: int = 20_000
    config_dir: str = "/etc/envoy"  # where Envoy finds the files that are made

    def __post_init__(self) -> None:
        """Raises ValueError where the parts contradict each other."""
        if not self.bridges:
            raise ValueError("an edge needs at least one bridge")
        if self.client_ca and not self.certificate:
            raise ValueError("certificates of clients are asked for in TLS: give the server's own, too")
        if self.http_client_certificates != "ignored" and not self.client_ca:
            raise ValueError("whose certificates are clients to have? give their authority")
        if self.routers and self.certificate and not self.client_ca:
            raise ValueError("the gRPC port knows no API keys: give the authority of its clients' certificates")
