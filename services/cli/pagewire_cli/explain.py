"""`pagewire explain`: where a prompt would be served now, and why; nothing is run."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.protobuf import json_format
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from pagewire_core.command_line import add_flags
from pagewire_core.errors import StartupError, from_rpc
from pagewire_core.flags import TLS_FLAGS, positive
from pagewire_core.rpc import open_channel
from pagewire_core.tls import ROUTER, TlsFiles, tls_files

from pagewire_cli.table import table

_TIMEOUT_S = 10.0


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser = subcommands.add_parser(
        "explain",
        help="show where a prompt would be served, and why",
        description="Asks the router which workers it would choose for a prompt now, with every term of every cost.",
    )
    parser.add_argument("prompt", help="what to place")
    parser.settable(parser.add_argument("--router", required=True, metavar="HOST:PORT", help="of the router (gRPC)"))
    parser.add_argument("--max-tokens", type=positive, default=0, metavar="N", help="tokens to generate at most")
    parser.add_argument("--session", default="", metavar="ID", help="of the requests that it belongs to")
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    add_flags(parser, TLS_FLAGS)
    parser.set_defaults(parser=parser, run=lambda args: asyncio.run(explain(args)))


async def explain(args: argparse.Namespace) -> None:
    """Prints the router's answer. Raises StartupError if it cannot be reached or refuses the prompt."""
    request = inference_pb2.GenerateRequest(text=args.prompt, session_id=args.session, completion_default_length=True)
    request.sampling.max_tokens = args.max_tokens
    answer = await asked_of(args.router, tls_files(args.tls_cert, args.tls_key, args.tls_ca), request)
    if args.json:
        print(
            json_format.MessageToJson(
                answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        )
    else:
        print("\n".join(report(answer)))


async def asked_of(
    router: str, tls: TlsFiles | None, request: inference_pb2.GenerateRequest
) -> inference_pb2.ExplainResponse:
    """Where a router would serve a request. Raises StartupError as `explain` does."""
    async with open_channel(router, tls, ROUTER) as channel:
        try:
            return await inference_pb2_grpc.InferenceServiceStub(channel).Explain(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise StartupError(f"{router} did not answer: {from_rpc(error).message}") from None


def report(answer: inference_pb2.ExplainResponse) -> Iterable[str]:
    """The answer as lines of text."""
    yield (
        f"{answer.prompt_tokens} prompt tokens, {answer.output_tokens:.0f} expected of each choice; "
        f"policy {answer.policy}, costs in {answer.unit}"
    )
    yield ""
    if not answer.candidates:
        yield "no worker can serve this request now"
    else:
        yield from _candidates(answer.candidates)
    yield ""
    yield from table(
        ["worker", "role", "hit", "waiting", "queue ms", "sequences", "KV tokens", "free tokens"],
        [
            [
                w.worker_id, _role(w.role), w.hit_tokens, w.waiting_tokens, f"{w.queue_ms:.1f}", w.num_sequences,
                w.kv_tokens, w.free_tokens,
            ]
            for w in answer.workers
        ],
    )  # fmt: skip
    if answer.circuits:
        yield ""
        yield from table(
            ["circuit", "workers", "cause", "state", "failures", "retry in s"],
            [
                [c.leg, " > ".join(c.workers), c.cause, c.state, c.failures, f"{c.retry_after_s:.1f}"]
                for c in answer.circuits
            ],
        )


def _candidates(candidates: Sequence[inference_pb2.RouteCandidate]) -> Iterable[str]:
    """A row for each; `*` marks those that the choice is made among."""
    names = list(dict.fromkeys(term.name for c in candidates for term in c.terms))
    rows = []
    for c in candidates:
        terms = {term.name: f"{term.value:.1f}" for term in c.terms}
        head = ["*" if c.may_be_chosen else "", c.prefill_worker or "-", c.decode_worker, f"{c.cost:.1f}"]
        rows.append([*head, *(terms.get(name, "") for name in names), f"{c.predicted_ttft_ms:.1f}"])
    yield from table(["", "prefill", "decode", "cost", *names, "TTFT ms"], rows)


def _role(role: int) -> str:
    return common_pb2.WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower()  # type: ignore[arg-type]
