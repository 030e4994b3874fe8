"""What `pagewire serve` will run: one frozen description per process, made before anything starts."""

from __future__ import annotations

import argparse
import functools
import os
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pagewire_core.command_line import to_command_line
from pagewire_core.errors import StartupError
from pagewire_core.flags import BRIDGE_FLAGS, FLAGS, ROUTER_FLAGS, WORKER_FLAGS
from pagewire_core.machine import available_cpus, num_threads
from pagewire_core.settings import CONFIG_VARIABLE, variable_of
from pagewire_core.telemetry import instance_name
from pagewire_core.tls import OPERATOR, TlsFiles

from pagewire_cli import gpus, ports, readiness, redis_server
from pagewire_cli.core_file import CoreFile

_LOOPBACK = "127.0.0.1"
_LONGEST_SOCKET_PATH = 100  # bytes; the limit is 107 on Linux, 103 on macOS
_CLOSE_S = 7.0  # what a service takes to end when nothing runs on it any more, at most
WORKER_ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True)
class ServiceSpec:
    """One process. `address` is where `is_ready` asks whether it can be used: host:port, or Redis' socket."""

    name: str
    role: str  # redis, prefill, decode, both, router or bridge
    address: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    is_ready: Callable[[str], Awaitable[bool]]
    flags: tuple[str, ...] = ()  # of the command, which is the program and these


@dataclass(frozen=True)
class Plan:
    """All processes of one `pagewire serve`; services are in the order in which they depend on each other."""

    services: tuple[ServiceSpec, ...]
    base_url: str
    redis_url: str
    model: str  # the name that clients ask for
    directory: Path
    verbose: bool
    state_file: Path | None
    grace_s: float = 15.0  # that each service has to stop
    tls: TlsFiles | None = None  # with which this process speaks to the services; made in `directory`/tls
    core_file: CoreFile | None = None

    def address_of(self, role: str) -> str:
        """Of the first of them."""
        return next(spec.address for spec in self.services if spec.role == role)


def make_plan(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Plan:
    """Chooses ports and command lines for settled `serve` arguments. Raises StartupError.

    A share of memory or of the cores is meant for the machine: the workers divide it, each GPU's between those that see
    it. Unless told how many threads each has, they lend each other the cores that they do not use.
    """
    names = [(f"{role}-{i}", role) for role in WORKER_ROLES for i in range(getattr(args, role))]
    count = args.api_server_count
    redis_port, spare, *free = ports.free_ports(2 + 2 * count + len(names))
    router_ports, own_ports, worker_ports = free[:count], free[count : 2 * count], free[2 * count :]
    bridge_port = args.port or spare
    directory = _state_directory(environ) / str(bridge_port)
    tls_directory = directory / "tls" if args.tls else None
    redis_address, redis_url = _redis(tls_directory, redis_port)
    redis_url = args.redis_url or redis_url
    divided = gpus.divide(
        gpus.seen(args.device, environ), len(names), args.tensor_parallel_size * args.pipeline_parallel_size
    )
    share = _share(args, len(names), divided.sharing)
    shared = {**vars(args), "redis_url": redis_url, "host": _LOOPBACK, "tls": tls_directory, **share}
    environment = _environment(environ, shared, args.parser.names)

    core_file = _core_file(args, len(names))
    services: list[ServiceSpec] = []
    if not args.redis_url:
        command = redis_server.command(redis_address, directory)
        services.append(ServiceSpec("redis", "redis", redis_address, command, environment, readiness.redis_answers))
    for index, ((name, role), port) in enumerate(zip(names, worker_ports, strict=True)):
        own = {**shared, "role": role, "worker_id": None, "port": port, "cpu_lending": None}
        own["cpus"] = cpus = _own_cpus(args, index, int(shared["threads"]), len(names))
        if core_file:
            own |= {"cpu_lending": core_file.path, "threads": len(cpus)}
        visible = divided.of_worker[index]
        seeing = environment if visible is None else {**environment, gpus.VISIBLE: ",".join(visible)}
        services.append(_service(name, role, own, WORKER_FLAGS, seeing))
    workers = [args.workers, *(f"{_LOOPBACK}:{port}" for port in worker_ports)]
    shared["workers"] = ",".join(filter(None, workers))
    services += _fronts(shared, router_ports, args.host, bridge_port, own_ports, environment)
    base_url = f"{'https' if args.ssl_certfile else 'http'}://{_dialled(args.host, bridge_port)}"
    verbose = args.verbose or args.log_level == "debug"
    model = (args.served_model_name or args.model).partition(",")[0]
    grace_s = args.graceful_termination_timeout + _CLOSE_S
    tls = _tls_files(tls_directory, OPERATOR)
    return Plan(
        tuple(services), base_url, redis_url, model, directory, verbose, args.state_file, grace_s, tls, core_file
    )


def _fronts(
    shared: Mapping[str, Any], router_ports: Sequence[int], host: str, port: int, own_ports: Sequence[int],
    environment: Mapping[str, str],
) -> Iterator[ServiceSpec]:  # fmt: skip
    """Routers, then bridges: a router of its own for each. Several bridges share a port, and have one of their own."""
    one = len(router_ports) == 1
    ranks = [None] if one else range(len(router_ports))
    for rank, router_port in zip(ranks, router_ports, strict=True):
        own = {**shared, "port": router_port, "api_server_rank": rank}
        yield _service(instance_name("router", rank), "router", own, ROUTER_FLAGS, environment)
    for rank, router_port, own_port in zip(ranks, router_ports, own_ports, strict=True):
        own = {**shared, "host": host, "port": port, "router": f"{_LOOPBACK}:{router_port}"}
        own |= {"api_server_rank": rank, "own_port": None if one else own_port}
        yield _service(instance_name("bridge", rank), "bridge", own, BRIDGE_FLAGS, environment)


def _redis(tls_directory: Path | None, port: int) -> tuple[str, str]:
    """Address and URL of our own Redis. It speaks no TLS: with TLS it is on a socket that only this user can open."""
    if tls_directory is None:
        return f"{_LOOPBACK}:{port}", f"redis://{_LOOPBACK}:{port}/0"
    path = tls_directory / "redis.sock"
    if len(bytes(path)) > _LONGEST_SOCKET_PATH:
        raise StartupError(f"{path} is too long a path for a socket; set XDG_STATE_HOME to a shorter one")
    return str(path), f"unix://{quote(str(path))}?db=0"


def _tls_files(directory: Path | None, role: str) -> TlsFiles | None:
    if directory is None:
        return None
    return TlsFiles(*(str(directory / name) for name in (f"{role}.crt", f"{role}.key", "ca.crt")))


def _service(
    name: str, role: str, values: Mapping[str, Any], flags: tuple[str, ...], environment: Mapping[str, str]
) -> ServiceSpec:
    program = role if role in ("router", "bridge") else "worker"
    if "@" in str(values["redis_url"]):  # a password belongs into the environment, not where `ps` shows it
        flags = tuple(flag for flag in flags if flag != "redis-url")
    flags = tuple(flag for flag in flags if flag != "api-key")
    own, asking = _tls_files(values["tls"], program), _tls_files(values["tls"], OPERATOR)
    paths = {"tls_cert": own and own.cert, "tls_key": own and own.key, "tls_ca": own and own.ca}
    given = tuple(to_command_line(argparse.Namespace(**values, **paths), flags))
    is_ready: Callable[[str], Awaitable[bool]]
    if role == "bridge":
        is_ready = _asks_bridge(values)
    else:
        asks = readiness.router_serves if role == "router" else readiness.grpc_serves
        is_ready = functools.partial(asks, tls=asking)
    own_port = values.get("own_port")  # at the shared one another might answer
    address = f"{_LOOPBACK}:{own_port}" if own_port else _dialled(str(values["host"]), values["port"])
    return ServiceSpec(name, role, address, (*_program(program), *given), environment, is_ready, given)


def _asks_bridge(values: Mapping[str, Any]) -> Callable[[str], Awaitable[bool]]:
    if not values["ssl_certfile"]:
        return readiness.http_healthy
    return readiness.https_answers if values["ssl_cert_reqs"] == ssl.CERT_REQUIRED else readiness.https_healthy


def _program(name: str) -> tuple[str, ...]:
    """The console script beside this interpreter, wherever PATH points; without one, the module it calls."""
    script = Path(sys.executable).parent / f"pagewire-{name}"
    if os.access(script, os.X_OK):
        return (str(script),)
    return (sys.executable, "-c", f"from pagewire_{name}.main import main; main()")


def _share(args: argparse.Namespace, num_workers: int, sharing: int) -> dict[str, object]:
    return {
        "threads": args.threads or max(1, num_threads(args.cpus) // num_workers),
        "gpu_memory_utilization": round(args.gpu_memory_utilization / sharing, 4),
    }


def _core_file(args: argparse.Namespace, num_workers: int) -> CoreFile | None:
    """To lend each other cores; not within a container's limit, which is not one of certain cores."""
    cores = len(args.cpus or available_cpus())
    if args.threads or not 1 < num_workers <= cores or num_threads(args.cpus) < cores:
        return None
    if not hasattr(os, "memfd_create"):
        return None
    return CoreFile()


def _own_cpus(args: argparse.Namespace, index: int, threads: int, num_workers: int) -> tuple[int, ...]:
    """Cores of worker `index` alone: its share of --cpus, or of all there are.

    None if there are too few for the threads. Raises StartupError if it is --cpus that names too few.
    """
    cpus = args.cpus or available_cpus()
    if threads * num_workers <= len(cpus):
        return cpus[len(cpus) * index // num_workers : len(cpus) * (index + 1) // num_workers]
    if args.cpus:
        raise StartupError(
            f"--cpus names {len(cpus)} cores; {num_workers} workers with {threads} threads each take "
            f"{threads * num_workers}: name more, or leave the flag out"
        )
    return ()


def _environment(environ: Mapping[str, str], values: Mapping[str, object], names: Iterable[str]) -> dict[str, str]:
    """The children's environment. Their settings come by flag: PAGEWIRE_PORT is ours and not each child's."""
    settings = {CONFIG_VARIABLE, *map(variable_of, (*FLAGS, *names))}
    inherited = {key: value for key, value in environ.items() if key not in settings}
    return {
        **inherited,
        "PAGEWIRE_REDIS_URL": str(values["redis_url"]),
        **({"PAGEWIRE_API_KEY": str(values["api_key"])} if values["api_key"] else {}),
        "OMP_NUM_THREADS": str(values["threads"]),
        "PYTHONUNBUFFERED": "1",
    }


def _dialled(host: str, port: object) -> str:
    """The address at which a server that listens on `host` can be reached from this machine."""
    if host in ("0.0.0.0", "::", ""):
        host = _LOOPBACK
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _state_directory(environ: Mapping[str, str]) -> Path:
    try:
        found = Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "pagewire"
        return found.absolute()  # a socket's URL has no other paths
    except RuntimeError:
        raise StartupError("there is no home directory to keep logs in; set XDG_STATE_HOME") from None
