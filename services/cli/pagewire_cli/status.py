"""`pagewire status`: the workers that a router knows, what they do, and how well it knows their caches."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import json_format
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from pagewire_core.command_line import add_flags
from pagewire_core.errors import StartupError, from_rpc
from pagewire_core.flags import TLS_FLAGS, positive
from pagewire_core.rpc import open_channel
from pagewire_core.tls import ROUTER, tls_files
from prometheus_client.parser import text_string_to_metric_families

from pagewire_cli.table import table

_TIMEOUT_S = 10.0
_CLEAR = "\033[H\033[2J"
# Of pagewire_index_level.
_LEVELS = ("follows Redis", "Redis is away, all is known", "Redis is away, some is missing", "asks the workers")

Samples = dict[str, dict[tuple[str, ...], float]]  # name -> (instance, other labels' values) -> value


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser(
        "status",
        help="show workers, their load and the index",
        description="Shows the workers that a router knows: role, load, KV in use and lanes; its queue and its index.",
    )
    parser.settable(parser.add_argument("--router", required=True, metavar="HOST:PORT", help="of the router (gRPC)"))
    parser.add_argument(
        "--watch", type=positive, nargs="?", const=2, metavar="S", help="show it again every S seconds (2)"
    )
    parser.add_argument("--json", action="store_true", help="print the router's answer, as JSON")
    add_flags(parser, TLS_FLAGS)
    parser.set_defaults(parser=parser, run=lambda args: asyncio.run(status(args)))


async def status(args: argparse.Namespace) -> None:
    """Prints it once, or until it is interrupted. Raises StartupError if the router cannot be reached."""
    tls = tls_files(args.tls_cert, args.tls_key, args.tls_ca)
    async with open_channel(args.router, tls, ROUTER) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        while True:
            try:
                answer = await stub.Status(inference_pb2.StatusRequest(), timeout=_TIMEOUT_S)
                metrics = await stub.Metrics(inference_pb2.MetricsRequest(), timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise StartupError(f"{args.router} did not answer: {from_rpc(error).message}") from None
            if args.json:
                text = json_format.MessageToJson(
                    answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                )
            else:
                text = "\n".join(report(answer, samples(metrics.text)))
            print(f"{_CLEAR if args.watch and sys.stdout.isatty() else ''}{text}", flush=True)
            if not args.watch:
                return
            await asyncio.sleep(args.watch)


def samples(text: str) -> Samples:
    """Of Prometheus text, by what `report` asks for."""
    found: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            found[sample.name][labels.pop("instance", ""), *labels.values()] = sample.value
    return found


def report(answer: inference_pb2.StatusResponse, metrics: Samples) -> Iterable[str]:
    """The answer as lines of text."""

    def of_router(name: str) -> float:
        return next(iter(metrics.get(f"pagewire_{name}", {}).values()), 0.0)

    level = int(of_router("index_level"))
    redis = "Redis answers" if answer.redis_connected else "Redis DOES NOT ANSWER"
    if "pagewire_redis_connected" not in metrics:
        redis = "no Redis"
    expected, false = of_router("expected_hit_tokens_total"), of_router("false_hit_tokens_total")
    yield (
        f"{answer.running_requests} requests running, {answer.queued_requests} queued "
        f"({of_router('queued_prompt_tokens'):.0f} prompt tokens)"
    )
    yield (
        f"index: {answer.indexed_blocks} blocks, {_LEVELS[min(level, len(_LEVELS) - 1)]}, incomplete for "
        f"{of_router('index_age_seconds'):.1f} s, {false / expected if expected else 0:.1%} of expected hits false; "
        f"{redis}"
    )
    yield ""
    if not answer.workers:
        yield "no worker is known"
        return
    yield from table(
        ["worker", "role", "state", "running", "waiting", "KV in use", "KV sent", "KV received"],
        [
            [
                w.worker_id, common_pb2.WorkerRole.Name(w.role).removeprefix("WORKER_ROLE_").lower(),
                "ready" if w.ready else "SUSPECT", w.num_running, w.num_waiting,
                f"{1 - w.free_blocks / w.total_blocks if w.total_blocks else 0:.0%} of {w.total_blocks} blocks",
                _moved(metrics, w.worker_id, "sent"), _moved(metrics, w.worker_id, "received"),
            ]
            for w in sorted(answer.workers, key=lambda w: (-w.role, w.worker_id), reverse=True)
        ],
    )  # fmt: skip


def _moved(metrics: Samples, worker_id: str, direction: str) -> str:
    """Bytes by lane."""
    lanes = {
        labels[-1]: value
        for labels, value in metrics.get("pagewire_kv_transfer_bytes_total", {}).items()
        if labels[0] == worker_id and labels[1] == direction and value
    }
    return ", ".join(f"{value / 2**20:.1f} MiB {lane}" for lane, value in sorted(lanes.items())) or "-"
