"""The composition root of a worker: everything is made here and nowhere else."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Coroutine
from functools import partial
from typing import Any

import structlog
from pagewire.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    kv_channel_pb2,
    kv_channel_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from pagewire_core import rpc, tracing
from pagewire_core.announced_host import address_of
from pagewire_core.block_events import BlockEventPublisher
from pagewire_core.command_line import shown_flags
from pagewire_core.flags import WORKER_FLAGS
from pagewire_core.redis_link import require_reachable
from pagewire_core.registry import Registration
from pagewire_core.shutdown import exit_within
from pagewire_core.startup import Timeline, freeze_heap
from pagewire_core.tls import TlsFiles
from pagewire_decode.servicer import DecodeServicer
from pagewire_decode.transfers import Transfers
from pagewire_engine.cpu.runner import CpuRunner
from pagewire_engine.engine import Engine, Outbox, deliver_outbox
from pagewire_engine.loader import Loaded
from pagewire_engine.metrics import CoreCollector, EngineCollector, SpeculationCollector, StageMetrics
from pagewire_engine.speculative.proposer import SpeculativeProposer
from pagewire_engine.warm_up import warm_up
from pagewire_prefill.servicer import PrefillServicer
from pagewire_prefill.source import PromptSource
from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.lanes import available_lanes, gpu_id
from pagewire_transfer.metrics import TransferMetrics
from pagewire_transfer.receiver import KvChannelServicer
from pagewire_transfer.sender import KvSender
from prometheus_client import CollectorRegistry, Info

from pagewire_worker.prefixes import PrefixFetcher, PrefixLender
from pagewire_worker.roles import NAMES, Roles
from pagewire_worker.servicer import WorkerServicer

log = structlog.get_logger(__name__)

CLOSE_S = 2.0  # how long what is handed over, and then the connections, may take to close


class Worker:
    """One engine and its gRPC services, from start to SIGTERM. host: where others reach it."""

    def __init__(
        self,
        args: argparse.Namespace,
        host: str,
        loaded: Loaded,
        proposer: SpeculativeProposer | None,
        instance: str,
        timeline: Timeline,
        tls: TlsFiles | None,
    ) -> None:
        self._args, self._loaded, self._proposer, self._instance = args, loaded, proposer, instance
        self._timeline = timeline
        self._tls = tls
        self._host = host
        self._registry = CollectorRegistry()
        self._role = Info("pagewire_worker", "What it does now", registry=self._registry)
        self._lanes = available_lanes(args.lanes, loaded.runner.config.device, tls is not None)
        self._publisher: BlockEventPublisher | None = None
        self._unpublished = 0  # changes of the prefix cache, where there is no Redis
        self._registration: Registration | None = None
        self._engine = Engine(
            loaded.runner,
            loaded.config,
            deliver=self._deliver,
            stored=self._stored,
            removed=self._removed,
            proposer=proposer,
        )
        self._transfers = Transfers(self._engine)
        self._sender: KvSender | None = None
        self._receiver: KvChannelServicer | None = None
        self._roles: Roles | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains."""
        self._loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(name, stopping.set)
        if self._args.redis_url:
            await require_reachable(self._args.redis_url)  # later it may come and go
        server = rpc.RpcServer(self._tls)
        address = address_of(self._host, server.bind(self._args.host, self._args.port))
        info = self._info(address)
        args = self._args
        tracing.configure("worker", args.otlp_traces_endpoint, args.otlp_service_name, info.worker_id)
        self._add_services(server, info)
        if progress := self._loaded.runner.progress:
            self._loop.add_reader(progress, self._engine.tell_layers)
        warm_up(self._engine)
        if self._proposer:
            self._proposer.policy.restart()
        freeze_heap()
        self._timeline.mark("warm-up")
        info.startup.extend(worker_pb2.StartupPhase(name=n, seconds=s) for n, s in self._timeline.phases.items())
        await server.serve()
        thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        thread.start()
        background = [asyncio.create_task(job) for job in self._redis_jobs(info)]
        await server.set_serving(True)
        log.info("worker ready", role=self._args.role, address=address, worker_id=info.worker_id, lanes=self._lanes,
                 startup=self._timeline.phases)  # fmt: skip
        await stopping.wait()
        log.info("draining")
        exit_within(self._args.graceful_termination_timeout + 3 * CLOSE_S)
        await self._stop(server, background)
        self._engine.stop()
        await asyncio.to_thread(thread.join, 5)

    def _run_engine(self) -> None:
        """A worker whose engine has a bug must be seen to be dead, not look healthy and answer nothing."""
        try:
            self._engine.run_forever()
        except BaseException:
            log.critical("the engine's loop failed", exc_info=True)
            os._exit(70)

    async def _stop(self, server: rpc.RpcServer, background: list[asyncio.Task[None]]) -> None:
        """Drains, then closes what never ends by itself."""
        assert self._roles is not None
        self._roles.stop_admitting()
        await server.set_serving(False)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if self._registration:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._registration.deregister(), 2)
        grace_s = self._args.graceful_termination_timeout
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s + CLOSE_S):
                async for _ in self._roles.drain(grace_s):
                    pass
        # A lane thread may sit for seconds in an operation with a peer that died: the exit of the process ends it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                if self._sender:
                    await self._sender.close()
                await server.stop(0)
                if self._receiver:
                    await self._receiver.close()

    def _add_services(self, server: rpc.RpcServer, info: worker_pb2.InfoResponse) -> None:
        registry = self._registry
        registry.register(EngineCollector(self._engine))  # type: ignore[arg-type]
        if isinstance(self._loaded.runner, CpuRunner):
            registry.register(CoreCollector(self._loaded.runner.cores))  # type: ignore[arg-type]
        if self._proposer:
            registry.register(SpeculationCollector(self._engine, self._proposer))  # type: ignore[arg-type]
        stages, transfer_metrics = StageMetrics(registry), TransferMetrics(registry)
        runner = self._loaded.runner
        identity = WorkerIdentity(
            info.worker_id,
            self._instance,
            self._loaded.fingerprint,
            runner.cache.layout,
            self._host,
            gpu_id(runner.config.device),
        )
        timeout_s = self._args.transfer_timeout
        self._take_role(self._args.role)
        # Every worker sends and receives: prefixes go between any two.
        source = PromptSource(self._engine)
        lender = PrefixLender(self._engine, source)
        self._sender = sender = KvSender(
            identity, lender, lanes=self._lanes, timeout_s=timeout_s, metrics=transfer_metrics, tls=self._tls
        )
        self._receiver = KvChannelServicer(
            identity, self._transfers, lanes=self._lanes, timeout_s=timeout_s, metrics=transfer_metrics
        )
        self._receiver.lend = partial(lender.lend, sender)
        self._transfers.abort_peer = self._receiver.abort
        server.add(
            kv_channel_pb2_grpc.add_KvChannelServiceServicer_to_server,
            self._receiver,
            kv_channel_pb2.DESCRIPTOR.services_by_name["KvChannelService"],
        )
        fetch = PrefixFetcher(self._engine, self._transfers, identity, info.address, self._tls, registry)
        constraints = self._loaded.constraints
        prefill = PrefillServicer(self._engine, source, sender, stages, constraints, fetch)
        server.add(
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
            prefill,
            prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"],
        )
        decode = DecodeServicer(self._engine, self._transfers, stages, self._instance, info.address, constraints, fetch)
        server.add(
            decode_pb2_grpc.add_DecodeServiceServicer_to_server,
            decode,
            decode_pb2.DESCRIPTOR.services_by_name["DecodeService"],
        )
        self._roles = Roles(self._args.role, prefill, decode, sender, self._receiver, self._take_role)
        server.add(
            worker_pb2_grpc.add_WorkerServiceServicer_to_server,
            WorkerServicer(
                info,
                self._stats,
                self._snapshot,
                registry,
                self._roles,
                self._engine.reset_prefix_cache,
                partial(server.set_serving, False),
            ),
            worker_pb2.DESCRIPTOR.services_by_name["WorkerService"],
        )

    def _redis_jobs(self, info: worker_pb2.InfoResponse) -> list[Coroutine[Any, Any, None]]:
        if not self._args.redis_url:
            log.warning("no --redis-url: this worker is found only by routers that are given its address")
            return []
        url, fingerprint = self._args.redis_url, self._loaded.fingerprint
        self._publisher = BlockEventPublisher(url, fingerprint, info.worker_id, self._instance, self._engine.snapshot)
        self._registration = Registration(url, _fields(info))
        return [self._registration.run(), self._publisher.run()]

    def _take_role(self, role: str) -> None:
        self._role.info({"role": role})
        self._engine.layers.enabled = role != "decode"  # where prompts of others are computed, layers are sent
        if self._registration:
            self._registration.set_role(role)

    def _info(self, address: str) -> worker_pb2.InfoResponse:
        config = self._loaded.config
        return worker_pb2.InfoResponse(
            worker_id=self._args.worker_id or f"{self._args.role}-{address}",
            instance=self._instance,
            role=NAMES[self._args.role],
            address=address,
            fingerprint=self._loaded.fingerprint,
            model_digest=self._loaded.model_digest,
            protocol=rpc.PROTOCOL,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            total_blocks=config.num_blocks,
            kv_bytes_per_token=self._loaded.runner.cache.bytes_per_token,
            lanes=self._lanes,
            constraints=self._loaded.constraints is not None,
            one_token=True,
            sampling_revision=rpc.SAMPLING_REVISION,
            flags=shown_flags(self._args, WORKER_FLAGS),
        )

    def _stats(self) -> worker_pb2.StatsResponse:
        load: dict[str, Any] = dict(self._engine.load())
        stats = worker_pb2.StatsResponse(**load, step_cost=self._engine.step_cost.to_proto())
        stats.block_events = self._num_changes
        stats.open_transfers = stats.waiting_transfers = len(self._transfers)
        if self._roles:
            stats.role, stats.draining = self._roles.role, self._roles.draining
        if self._sender:
            stats.open_transfers += self._sender.open_transfers
            stats.staging_slots += self._sender.staging_slots
        if self._receiver:
            stats.open_transfers += self._receiver.open_transfers
            stats.staging_slots += self._receiver.staging_slots
        return stats

    def _snapshot(self) -> tuple[int, list[bytes]]:
        sequence = self._num_changes  # before the snapshot, which then has at least these
        return sequence, self._engine.snapshot()

    @property
    def _num_changes(self) -> int:
        """Of the prefix cache."""
        return self._publisher.sequence if self._publisher else self._unpublished

    # ------------------------------------------------- called by the engine's thread

    def _deliver(self, outbox: Outbox) -> None:
        """One wake-up of the event loop for all that a step gave."""
        if outbox and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver_outbox, outbox)

    def _stored(self, hashes: Any) -> None:
        if self._publisher:
            self._publisher.stored(hashes)
        else:
            self._unpublished += 1

    def _removed(self, hashes: Any) -> None:
        if self._publisher:
            self._publisher.removed(hashes)
        else:
            self._unpublished += 1


def _fields(info: worker_pb2.InfoResponse) -> dict[str, str | int]:
    """What the registry says of this worker."""
    return {
        "worker_id": info.worker_id,
        "instance": info.instance,
        "address": info.address,
        "role": common_pb2.WorkerRole.Name(info.role).removeprefix("WORKER_ROLE_").lower(),
        "fingerprint": info.fingerprint.hex(),
        "protocol": info.protocol,
    }
