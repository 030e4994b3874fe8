"""Starts every service of one machine, keeps them running, and stops them in order.

serve -> checks (port, Redis) -> redis -> workers; router, bridge -> all ready -> watch
SIGINT, SIGTERM, SIGHUP: bridge -> router -> workers -> redis; a second one kills all at once
A service that ends before it was ever ready ends everything; later it is started again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
from pagewire.v1 import inference_pb2 as pb
from pagewire.v1 import inference_pb2_grpc as pb_grpc
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model
from pagewire_core.redis_link import require_reachable
from pagewire_core.rpc import open_channel
from pagewire_core.tls import ROUTER

from pagewire_cli import console, ports, readiness, state_file
from pagewire_cli.copies import why_one
from pagewire_cli.plan import WORKER_ROLES, Plan, make_plan
from pagewire_cli.service import Service
from pagewire_cli.version import installed_version
from pagewire_cli.zygote import Zygote

FIRST_RESTART_S = 1.0
LAST_RESTART_S = 30.0
_POLL_S = 0.02
_STABLE_S = 60.0  # a life this long forgets the deaths before it
_STOP_ORDER = {"bridge": 0, "router": 1, "redis": 3}  # workers: 2
_ONCE = frozenset({"redis", "router", "bridge"})  # unless told otherwise


def serve(args: argparse.Namespace, started: float, zygote: Zygote | None = None) -> None:
    """Runs settled `serve` arguments until a signal. `started`: time.monotonic() of the command's start.

    zygote: of the workers, closed as soon as they run.

    Raises StartupError before anything runs if the port is taken or loopback or Redis cannot be reached, and after
    everything is stopped again if a service does not start.
    """
    ports.require_loopback()
    if args.port:
        ports.require_free(args.host, args.port)
    if args.redis_url:
        asyncio.run(require_reachable(args.redis_url))
    # Downloads it where that can be watched, and outside of a loop, which would keep the first Ctrl-C to itself.
    model = resolve_model(args.model, args.revision, args.download_dir)
    if args.any_workers and (why := why_one(args, model)):
        args.prefill, args.decode, args.both = 0, 0, 1
        console.say(f"one worker for both stages, as {why}; --prefill 1 --decode 1 starts two all the same")
    plan = make_plan(args)
    console.say(f"pagewire {installed_version()} starts {_summary(plan)} for {args.model}; logs: {plan.directory}")
    asyncio.run(Supervisor(plan, started, zygote).run())


class Supervisor:
    def __init__(self, plan: Plan, started: float, zygote: Zygote | None = None) -> None:
        self._plan = plan
        self._zygote = zygote
        self._started = started
        self._services = [Service(spec, plan.directory / f"{spec.name}.log") for spec in plan.services]
        self._unready = {service.spec.name for service in self._services}
        self._stop_requested = asyncio.Event()

    async def run(self) -> None:
        """Returns after a signal, when every process is gone. Raises StartupError as `serve` says."""
        with self._own_directory():
            self._prepare_files()
            loop = asyncio.get_running_loop()
            for number in (signals := _signals()):
                loop.add_signal_handler(number, self._on_signal)
            try:
                await self._until_stop_requested(self._supervise_all())
            finally:
                await self._stop_all()
                for number in signals:
                    loop.remove_signal_handler(number)

    @contextlib.contextmanager
    def _own_directory(self) -> Iterator[None]:
        """Another deployment would replace the logs, the certificates and the socket of this one."""
        try:
            self._plan.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._plan.directory, os.O_RDONLY)
        except OSError as error:
            raise _no_logs(error) from None
        try:
            _lock(descriptor, self._plan.directory)
            yield
        finally:
            os.close(descriptor)

    def _prepare_files(self) -> None:
        try:
            if self._plan.tls is not None:
                from pagewire_cli.authority import Authority, write_certificates

                # The authority's key is never on disk: nobody can be added to this deployment.
                write_certificates(Authority.new(), Path(self._plan.tls.ca).parent)
            for service in self._services:
                service.log_path.unlink(missing_ok=True)
                service.open_log()
        except OSError as error:
            raise _no_logs(error) from None
        if self._plan.state_file is not None:
            try:
                state_file.prepare(self._plan.state_file)
            except OSError as error:
                raise StartupError(f"cannot write --state-file: {error}; choose another path") from None

    def _on_signal(self) -> None:
        if self._stop_requested.is_set():
            for service in self._services:
                service.kill()
        self._stop_requested.set()

    async def _until_stop_requested(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop_requested.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.gather(stop, task, return_exceptions=True)

    async def _supervise_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for redis in self._of("redis"):
                    redis.spawn()
                    await self._watch(redis, group).wait()
                group.create_task(self._begin_workers(group))
                await self._begin_fronts(group)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _of(self, *roles: str) -> list[Service]:
        return [service for service in self._services if service.spec.role in roles]

    async def _begin_workers(self, group: asyncio.TaskGroup) -> None:
        for worker in self._of(*WORKER_ROLES):
            if self._zygote is None:
                worker.spawn()
            else:
                await worker.spawn_from(self._zygote)
            self._watch(worker, group)
        if self._zygote is not None:
            self._zygote.close()

    async def _begin_fronts(self, group: asyncio.TaskGroup) -> None:
        """One after the other: of two cores, one is for the workers' imports, which take longest."""
        for front in self._of("router", "bridge"):
            front.spawn()
            self._watch(front, group)
            while front.spec.role == "router" and not await readiness.listens(front.spec.address):
                await asyncio.sleep(_POLL_S)

    def _watch(self, service: Service, group: asyncio.TaskGroup) -> asyncio.Event:
        """Keeps what has been spawned running. The event is set when it is ready."""
        if self._plan.verbose:
            group.create_task(console.follow(service.spec.name, service.log_path))
        ready = asyncio.Event()
        group.create_task(self._supervise(service, ready))
        return ready

    async def _supervise(self, service: Service, ready: asyncio.Event) -> None:
        await self._say_ready(service)
        ready.set()
        self._unready.discard(service.spec.name)
        if not self._unready:
            await self._announce()
        await self._keep_running(service)

    async def _say_ready(self, service: Service) -> None:
        seconds = await service.wait_ready()
        is_worker = service.spec.role in WORKER_ROLES
        phases = await readiness.startup_phases(service.spec.address, self._plan.tls) if is_worker else {}
        console.ready(service, seconds, phases)

    async def _keep_running(self, service: Service) -> None:
        delay_s = FIRST_RESTART_S
        while True:
            await service.wait_exit()
            if time.monotonic() - service.started_at > _STABLE_S:
                delay_s = FIRST_RESTART_S
            console.died(service, delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LAST_RESTART_S)
            service.spawn()
            # One that ends before it is ready has its words printed by the next round.
            with contextlib.suppress(StartupError):
                await self._say_ready(service)
                self._write_state_file()

    async def _announce(self) -> None:
        """Everything is ready: says so, with a command to try it."""
        is_chat = await self._has_chat_template()
        self._write_state_file()
        if self._plan.tls is not None:
            console.say(f"Commands take --tls-ca {self._plan.tls.ca} --tls-cert {self._plan.tls.cert} "
                        f"--tls-key {self._plan.tls.key}")  # fmt: skip
        console.say(f"All ready after {time.monotonic() - self._started:.1f} s. Ctrl-C stops everything. Try:")
        console.say(console.curl_line(self._plan.base_url, self._plan.model, is_chat))

    async def _has_chat_template(self) -> bool:
        async with open_channel(self._plan.address_of("router"), self._plan.tls, ROUTER) as channel:
            try:
                response = await pb_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=5.0)
            except grpc.aio.AioRpcError:  # it went away again: its watcher sees to that
                return True
        return all(model.is_chat for model in response.models if model.name == self._plan.model)

    def _write_state_file(self) -> None:
        if self._plan.state_file is not None and not self._unready:
            try:
                state_file.write(self._plan.state_file, self._plan, self._services)
            except OSError as error:  # no reason to stop serving
                console.say(f"cannot write --state-file: {error}")

    def _remove_state_file(self) -> None:
        if self._plan.state_file is not None:
            with contextlib.suppress(OSError):
                self._plan.state_file.unlink(missing_ok=True)

    async def _stop_all(self) -> None:
        self._stop_requested.set()  # also after a failure: the next signal kills
        running = [service for service in self._services if service.is_running()]
        if running:
            console.say("Stopping; Ctrl-C again kills.")
        for _, services in groupby(sorted(running, key=_stop_rank), key=_stop_rank):
            await asyncio.gather(*(self._stop(service) for service in services))
        self._remove_state_file()
        if running:
            console.say("All stopped.")

    async def _stop(self, service: Service) -> None:
        if not await service.stop(self._plan.grace_s):
            console.say(f"{service.spec.name:<12} was killed: it had not stopped after {self._plan.grace_s:g} s")


def _lock(descriptor: int, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartupError(
            f"another pagewire serve uses {directory}; choose another --port, or another folder as XDG_STATE_HOME"
        ) from None
    except OSError:  # not every file system can lock
        return


def _no_logs(error: OSError) -> StartupError:
    return StartupError(f"cannot write logs: {error}; set XDG_STATE_HOME to a writable folder")


def _signals() -> list[signal.Signals]:
    """Those that stop everything: not a hangup that is ignored, as `nohup` asks for."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    return numbers if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*numbers, signal.SIGHUP]


def _stop_rank(service: Service) -> int:
    return _STOP_ORDER.get(service.spec.role, 2)


def _summary(plan: Plan) -> str:
    counts = [(role, len(list(specs))) for role, specs in groupby(plan.services, key=lambda spec: spec.role)]
    return ", ".join(role if role in _ONCE and count == 1 else f"{count} {role}" for role, count in counts)
