"""`pagewire envoy-config`: the configuration of an Envoy in front of bridges and routers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pagewire_core.command_line import add_flags
from pagewire_core.errors import StartupError
from pagewire_core.flags import SSL_FLAGS, TLS_FLAGS, port

if TYPE_CHECKING:
    from pagewire_envoy.edge import Edge

_CLIENT_CERTIFICATES: tuple[Literal["ignored", "checked", "required"], ...] = (
    "ignored",
    "checked",
    "required",
)  # by --ssl-cert-reqs


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser(
        "envoy-config",
        help="write the configuration of an Envoy",
        description="Writes envoy.yaml, and a file for each certificate that Envoy is to watch. The --ssl-* flags are "
        "what clients meet; --tls-* is who Envoy is to bridges (which then speak HTTPS with their own role's "
        "certificate) and routers: the certificate of the role `client`.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the files go")
    parser.add_argument("--mounted-at", metavar="PATH", help="where Envoy finds them; default: DIR")
    parser.add_argument("--bridges", required=True, metavar="HOST:PORT,...", help="names are resolved every 2 s")
    parser.add_argument("--routers", default="", metavar="HOST:PORT,...", help="offers their gRPC API, too")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on")
    parser.add_argument("--port", type=port, default=8000, help="of HTTP")
    parser.add_argument("--grpc-port", type=port, default=9000, help="of gRPC and gRPC-Web")
    parser.add_argument("--metrics-port", type=port, default=9902, help="of /stats/prometheus and /ready")
    parser.add_argument("--admin-port", type=port, default=9901, help="of Envoy's own pages, on loopback alone")
    add_flags(parser, (*SSL_FLAGS, *TLS_FLAGS, "allowed-origins", "request-timeout"))
    parser.set_defaults(parser=parser, run=_run)


def _run(args: argparse.Namespace) -> None:
    from pagewire_envoy import files  # YAML: not wanted by the other commands

    edge = _edge(args)
    try:
        written = files.write(edge, args.directory)
    except OSError as error:
        raise StartupError(f"cannot write to {args.directory}: {error.strerror}") from None
    print(f"{args.directory}: {', '.join(path.name for path in written)}")


def _edge(args: argparse.Namespace) -> Edge:
    """The files need not be here, nor need Envoy: they are named as Envoy finds them. Raises StartupError."""
    from pagewire_envoy.edge import Address, Certificate, Edge, InternalTls

    def addresses(text: str) -> tuple[Address, ...]:
        return tuple(Address.parse(part.strip()) for part in text.split(",") if part.strip())

    own = _together(args, "tls_cert", "tls_key", "tls_ca")
    shown = _together(args, "ssl_certfile", "ssl_keyfile")
    try:
        return Edge(
            bridges=addresses(args.bridges),
            routers=addresses(args.routers),
            host=args.host,
            http_port=args.port,
            grpc_port=args.grpc_port,
            metrics_port=args.metrics_port,
            admin_port=args.admin_port,
            certificate=Certificate(*shown) if shown else None,
            client_ca=args.ssl_ca_certs,
            http_client_certificates=_CLIENT_CERTIFICATES[args.ssl_cert_reqs],
            internal=InternalTls(Certificate(*own[:2]), own[2]) if own else None,
            allowed_origins=args.allowed_origins,
            request_timeout_s=args.request_timeout,
            config_dir=args.mounted_at or str(args.directory.resolve()),
        )
    except ValueError as error:
        raise StartupError(str(error)) from None


def _together(args: argparse.Namespace, *names: str) -> list[str]:
    """The values of flags that make sense only together; none if none is given."""
    values = [getattr(args, name) for name in names]
    if any(values) and not all(values):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise StartupError(f"{flags} go together; give all or none")
    return [value for value in values if value]
