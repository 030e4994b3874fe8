"""Composition root of the bridge: flags, socket, server."""

from __future__ import annotations

import argparse
import math
import signal
import socket

import structlog
import uvicorn
from pagewire_core import tracing
from pagewire_core.command_line import run_main, shown_flags
from pagewire_core.errors import StartupError
from pagewire_core.flags import BRIDGE_FLAGS
from pagewire_core.rpc import warn_of_plain_text
from pagewire_core.startup import allow_connections, freeze_heap
from pagewire_core.telemetry import configure_logging
from pagewire_core.tls import tls_files, with_certificates
from starlette.types import ASGIApp

from pagewire_bridge.answer_parser import AnswerFormat
from pagewire_bridge.app import create_app
from pagewire_bridge.client import RouterClient
from pagewire_bridge.https import HttpsFiles, https_files
from pagewire_bridge.keys import load_keys
from pagewire_bridge.reasoning import REASONING_FORMATS
from pagewire_bridge.tools.families import TOOL_FORMATS
from pagewire_bridge.write_timeout import http_protocol

log = structlog.get_logger(__name__)

# Longer than what clients and proxies keep an idle connection: they close it, and no request meets our close.
KEEP_ALIVE_S = 75
BACKLOG = 2048
SEND_BUFFER_BYTES = 128 << 10  # of the kernel, for each client; left to itself it grows to 4 MiB that nobody reads


def listen(host: str, port: int, shared: bool = False, flag: str = "--port") -> socket.socket:
    """A listening socket. shared: with other processes of this user that say so, too; the kernel spreads connections.
    flag: that names the port.

    Raises StartupError when the address is taken or is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or {flag}"
        ) from error
    return listener


def build_server(
    app: ASGIApp, grace_s: float = 10.0, send_timeout_s: float = 30.0, https: HttpsFiles | None = None
) -> uvicorn.Server:
    """The HTTP server, not yet running; logging is ours, not uvicorn's. grace_s: for running requests at the end."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http=http_protocol(send_timeout_s),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(grace_s),
            backlog=BACKLOG,
            ssl_context_factory=(lambda _config, _default: https.server_context()) if https else None,
        )
    )


def serve(flags: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT, then drains. Raises StartupError."""
    configure_logging("bridge", flags.log_format, flags.log_level)
    tracing.configure("bridge", flags.otlp_traces_endpoint, flags.otlp_service_name)
    if not flags.router:
        raise StartupError("the bridge needs --router host:port")
    if flags.enable_auto_tool_choice and not flags.tool_call_parser:
        raise StartupError("--enable-auto-tool-choice needs --tool-call-parser")
    tls = tls_files(flags.tls_cert, flags.tls_key, flags.tls_ca)
    https = https_files(flags.ssl_keyfile, flags.ssl_certfile, flags.ssl_ca_certs, flags.ssl_cert_reqs)
    if https:
        https.server_context()  # a mistake shows before anything is begun
    warn_of_plain_text(flags.host, https is not None, "--ssl-certfile and --ssl-keyfile")
    keys = load_keys(flags.api_key, flags.api_keys_file)
    allow_connections()
    shared = flags.own_port is not None
    listeners = [listen(flags.host, flags.port, shared)]
    if flags.ollama_port:
        listeners.append(listen(flags.host, flags.ollama_port, shared, "--ollama-port"))
    if shared:
        listeners.append(listen("127.0.0.1", flags.own_port))
    host, port = listeners[0].getsockname()[:2]
    app = create_app(
        lambda: RouterClient(flags.router, flags.request_timeout, tls),
        lambda: log.info("bridge ready", host=host, port=port, router=flags.router),
        answers=AnswerFormat(
            TOOL_FORMATS[flags.tool_call_parser] if flags.tool_call_parser else None,
            flags.enable_auto_tool_choice,
            REASONING_FORMATS[flags.reasoning_parser] if flags.reasoning_parser else None,
        ),
        keys=keys,
        redis_url=with_certificates(flags.redis_url, tls),
        response_ttl_s=flags.response_store_ttl,
        allowed_origins=flags.allowed_origins,
        root_path=flags.root_path,
        always_usage=flags.enable_force_include_usage,
        with_docs=not flags.disable_fastapi_docs,
        with_tokenizer_info=flags.enable_tokenizer_info_endpoint,
        rank=flags.api_server_rank,
        flags=shown_flags(flags, BRIDGE_FLAGS),
    )
    server = build_server(app, flags.graceful_termination_timeout, flags.send_timeout, https)
    # uvicorn drains on these signals and then raises them again for whoever handled them before: nobody needs to, and
    # the process ends with exit code 0. One that comes before it runs counts, too.
    for ended_by in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ended_by, server.handle_exit)
    freeze_heap()
    server.run(sockets=listeners)
    tracing.close()


def main() -> None:
    """Entry point of `pagewire-bridge`."""
    run_main(
        "pagewire-bridge",
        serve,
        BRIDGE_FLAGS,
        "The OpenAI, TGI, Ollama and Anthropic APIs over HTTP, in front of a router.",
    )


if __name__ == "__main__":
    main()
