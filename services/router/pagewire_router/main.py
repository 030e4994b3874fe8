"""`pagewire-router`: makes the objects of one router, serves until a signal, and lets requests finish."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import structlog
import uvloop
from pagewire.v1 import inference_pb2, inference_pb2_grpc
from pagewire_core import faults, tracing
from pagewire_core.announced_host import address_of
from pagewire_core.command_line import run_main, shown_flags
from pagewire_core.errors import StartupError
from pagewire_core.feed import Feeds
from pagewire_core.flags import ROUTER_FLAGS
from pagewire_core.prefix_index import IndexFollower, PrefixIndex
from pagewire_core.redis_link import require_reachable
from pagewire_core.rpc import RpcServer
from pagewire_core.shutdown import exit_within
from pagewire_core.startup import freeze_heap
from pagewire_core.telemetry import configure_logging, instance_name
from pagewire_core.tls import TlsFiles, tls_files, with_certificates

from pagewire_router.admission import Admission, Limits
from pagewire_router.breakers import Breakers
from pagewire_router.discovery import Discovery
from pagewire_router.generation import Services
from pagewire_router.grammars import Grammars
from pagewire_router.metrics import RouterMetrics
from pagewire_router.model import ServedModel, load_served_model
from pagewire_router.placement import Placement
from pagewire_router.policies import POLICIES
from pagewire_router.request_log import RequestLog
from pagewire_router.request_templates import RequestTemplates
from pagewire_router.room import room_of
from pagewire_router.sampling_defaults import tell
from pagewire_router.servicer import InferenceServicer, Router, Timeouts
from pagewire_router.workers import Worker, WorkerTable

log = structlog.get_logger(__name__)

_CLOSE_S = 3.0  # how long connections may take to close after that
_LOOK_S = 0.01  # reports of many workers within it are looked at together


def main() -> None:
    run_main("pagewire-router", _run, ROUTER_FLAGS, "Places requests on prefill and decode workers.")


def _run(args: argparse.Namespace) -> None:
    faults.arm(os.environ.get(faults.VARIABLE))
    configure_logging("router", args.log_format, args.log_level)
    tracing.configure("router", args.otlp_traces_endpoint, args.otlp_service_name)
    if not args.model:
        raise StartupError("no model: give --model a directory or a Hub id")
    if not args.redis_url and not args.workers:
        raise StartupError("no workers to know of: give --redis-url, --workers, or both")
    tls = tls_files(args.tls_cert, args.tls_key, args.tls_ca)
    args.redis_url = with_certificates(args.redis_url, tls)
    model = load_served_model(
        args.model,
        tokenizer=args.tokenizer,
        revision=args.revision,
        download_dir=args.download_dir,
        served_names=args.served_model_name,
        chat_template=args.chat_template,
        default_chat_template_kwargs=args.default_chat_template_kwargs,
        max_input_tokens=args.max_input_tokens,
        generation_config=args.generation_config,
        override_generation_config=args.override_generation_config,
        max_logprobs=args.max_logprobs,
        seed=args.seed,
    )
    tell(model.sampling_defaults)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(args, model, tls))
    tracing.close()


async def _serve(args: argparse.Namespace, model: ServedModel, tls: TlsFiles | None) -> None:
    if args.redis_url and not args.workers:  # with a list of workers it can do without from the start
        await require_reachable(args.redis_url)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with running_router(args, model, tls) as (router, server, port):
        log.info("router ready", address=address_of(args.host, port), model=model.names[0])
        await stopping.wait()
        log.info("router stopping", running=router.admission.num_running)
        grace_s = args.graceful_termination_timeout
        exit_within(grace_s + _CLOSE_S)
        router.feeds.drain()
        await server.stop(grace_s)  # new calls go elsewhere; those that are here run, or wait for their turn


@contextlib.asynccontextmanager
async def running_router(
    args: argparse.Namespace, model: ServedModel, tls: TlsFiles | None = None
) -> AsyncIterator[tuple[Router, RpcServer, int]]:
    """A router that listens; leaving the scope ends it without grace. `args` are ROUTER_FLAGS."""
    index, metrics = PrefixIndex(), RouterMetrics(instance_name("router", args.api_server_rank))
    follower = IndexFollower(args.redis_url, index, lambda worker_id: workers.snapshot(worker_id), metrics.gap_mended)

    def joined(worker: Worker) -> None:
        follower.joined(worker.worker_id, worker.info.instance, worker.info.fingerprint)
        worker.feed.timed = metrics.text_s.observe
        placement.joined(worker)

    def left(worker: Worker) -> None:
        follower.left(worker.worker_id)
        placement.left(worker)

    def reported(worker: Worker) -> None:
        index.told(worker.worker_id, worker.stats.block_events)

    def switched(worker: Worker) -> None:
        placement.switched(worker)

    workers = WorkerTable(model.digest, joined, left, tls, reported, switched)
    discovery = Discovery(args.redis_url, workers) if args.redis_url else None
    if discovery is None:  # what is not there is not away
        metrics.registry.unregister(metrics.redis_connected)
    admission = Admission(Limits(args.max_queued_requests, args.max_queued_tokens), lambda: room_of(workers.live))
    breakers = Breakers(opened=lambda breaker: metrics.circuits_opened.labels(breaker.leg, breaker.cause).inc())
    placement = Placement(workers, index, POLICIES[args.routing_policy], breakers)
    services = Services(workers, placement, model.tokenizer, metrics, args.transfer_timeout)
    feeds = Feeds(inference_pb2.DeltaFeedResponse)
    timeouts = Timeouts(args.request_timeout, args.send_timeout)
    grammars = Grammars(model.tokenizer.path, model.vocab_size, model.eos_token_ids)
    templates = RequestTemplates(model.special_texts, args.trust_request_chat_template)
    flags = shown_flags(args, ROUTER_FLAGS)
    asked = RequestLog(model.tokenizer, args.max_log_len) if args.enable_log_requests else None
    router = Router(
        model, services, admission, index, follower, discovery, timeouts, feeds, grammars, templates, asked, flags
    )
    server = RpcServer(tls)
    server.add(
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        InferenceServicer(router),
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    )
    freeze_heap()
    port = await server.start(args.host, args.port)
    workers.set_static(a.strip() for a in args.workers.split(",") if a.strip())
    tasks = [follower.run(), _report_health(server, workers, admission), *([discovery.run()] if discovery else [])]
    try:
        async with _background(tasks):
            yield router, server, port
    finally:
        await server.stop(0)
        await grammars.close()
        await templates.close()
        await workers.close()


@contextlib.asynccontextmanager
async def _background(coroutines: list[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Runs tasks that never end by themselves; one that fails ends the body with its error."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(c) for c in coroutines]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _report_health(server: RpcServer, workers: WorkerTable, admission: Admission) -> None:
    """SERVING while some request could be served; a change of the workers lets waiting requests in."""
    serving: bool | None = None
    while True:
        while workers.usable != serving:
            serving = workers.usable
            await server.set_serving(serving)
        admission.wake()
        await workers.wait_changed(1.0)  # nothing has changed since they were looked at: no other task had a turn
        await asyncio.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
