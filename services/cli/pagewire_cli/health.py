"""`pagewire-health`: one service's health as an exit code, for the probes of containers.

They ask every few seconds in every container, so this imports as little as it can: 0.1 s of CPU for a bridge and 0.3 s
for the others, where the `pagewire` command takes 0.8 s.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_DOMAIN = "pagewire.internal"  # as in pagewire_core.tls
_TLS = ("cert", "key", "ca")


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Exit code 1 and a sentence if the service is not as it is asked to be."""
    parser = argparse.ArgumentParser(
        prog="pagewire-health",
        allow_abbrev=False,
        description="Exit code 0: the service takes requests. 1: it does not, as while it starts or drains. With TLS "
        "the certificate of any service will do, also the asked one's own.",
    )
    parser.add_argument("service", choices=("worker", "router", "bridge"))
    parser.add_argument("address", metavar="HOST:PORT", help="of the service; https://HOST:PORT for a bridge with TLS")
    parser.add_argument("--live", action="store_true", help="it need only answer: what drains is alive")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="for the answer (default: 5)")
    for name in _TLS:
        default = environ.get(f"PAGEWIRE_TLS_{name.upper()}")
        parser.add_argument(f"--tls-{name}", default=default, help=f"default: PAGEWIRE_TLS_{name.upper()}")
    args = parser.parse_args(argv)
    ask = _bridge_is_ready if args.service == "bridge" else _grpc_is_serving
    try:
        is_ready = ask(args)
    except OSError as error:
        sys.stderr.write(f"pagewire-health: cannot use the --tls-* files: {error}\n")
        raise SystemExit(1) from None
    if is_ready is None or not (is_ready or args.live):
        said = "does not answer" if is_ready is None else "is not ready"
        sys.stderr.write(f"pagewire-health: the {args.service} at {args.address} {said}\n")
        raise SystemExit(1)


def _bridge_is_ready(args: argparse.Namespace) -> bool | None:
    """GET /health is answered 200; None without an answer."""
    import http.client
    import ssl

    address = args.address.removeprefix("http://")
    connect: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
    if address.startswith("https://"):
        # The address is our own: it need not prove who it is.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if args.tls_cert and args.tls_key:
            context.load_cert_chain(args.tls_cert, args.tls_key)
        address = address.removeprefix("https://")
        connect = functools.partial(http.client.HTTPSConnection, context=context)
    try:
        with contextlib.closing(connect(address, timeout=args.timeout)) as connection:
            connection.request("GET", "/health")
            return bool(connection.getresponse().status == http.client.OK)
    except (OSError, http.client.HTTPException):  # of the latter, also an address that is none
        return None


def _grpc_is_serving(args: argparse.Namespace) -> bool | None:
    """What the standard gRPC health service says; None if nothing does."""
    import grpc
    from grpc_health.v1 import health_pb2

    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    channel = grpc.insecure_channel(args.address, options)
    if args.tls_cert and args.tls_key and args.tls_ca:
        ca, key, cert = (Path(path).read_bytes() for path in (args.tls_ca, args.tls_key, args.tls_cert))
        options.append(("grpc.ssl_target_name_override", f"{args.service}.{_DOMAIN}"))
        channel = grpc.secure_channel(args.address, grpc.ssl_channel_credentials(ca, key, cert), options)
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    with channel:
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=args.timeout)
        except grpc.RpcError:
            return None
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
