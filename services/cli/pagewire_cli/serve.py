"""`pagewire serve`: its flags, and what it says about flags it does not have."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pagewire_core.command_line import PRECEDENCE, add_flags
from pagewire_core.errors import StartupError
from pagewire_core.flags import BRIDGE_FLAGS, FLAGS, ROUTER_FLAGS, TLS_FLAGS, WORKER_FLAGS, number, positive

from pagewire_cli.vllm_flags import NOT_IMPLEMENTED, add_others, refuse_otherwise, without_effect
from pagewire_cli.zygote import Zygote, helps

# What the supervisor decides for each process itself.
_OWN = frozenset({"role", "worker-id", "router", "cpu-lending", "own-port", "api-server-rank", *TLS_FLAGS})
SERVE_FLAGS: tuple[str, ...] = tuple(
    name for name in dict.fromkeys((*ROUTER_FLAGS, *WORKER_FLAGS, *BRIDGE_FLAGS)) if name not in _OWN
)
_count = number("count", int, lambda n: n >= 0, "must not be negative")
DEFAULTS = {"port": 8000}
_EXAMPLES = """\
examples:
  pagewire serve                                    the demo model, one prefill and one decode worker
  pagewire serve Qwen/Qwen3-0.6B --prefill 2        a model of the Hugging Face Hub
  pagewire serve --both 1 --port 9000               one worker that does everything
  pagewire serve --config production.yaml"""


def add_subcommand(
    subcommands: argparse._SubParsersAction[Any],
    environ: Mapping[str, str] = os.environ,
    defaults: Mapping[str, object] = DEFAULTS,
) -> None:
    """Adds `serve` with the flags of all services; --host and --port are those of the HTTP server."""
    parser = subcommands.add_parser(
        "serve",
        help="serve a model on this machine",
        usage="pagewire serve [MODEL] [flags]",
        description="Starts Redis, workers, a router and the HTTP server, and keeps them running until Ctrl-C.",
        epilog=f"{PRECEDENCE}\n\n{_EXAMPLES}",
        environ=environ,
        not_implemented=NOT_IMPLEMENTED,
    )
    parser.add_argument("model_tag", nargs="?", type=FLAGS["model"].type, metavar="MODEL",
                        help="same as --model; default: the demo model")  # fmt: skip
    parser.add_config()
    group = parser.add_argument_group("the deployment")
    for action in (
        group.add_argument("--prefill", type=_count, metavar="N", help="prefill workers; default 1, or 0 with "
                           "--both and where the machine has no room for two copies of the weights"),
        group.add_argument("--decode", type=_count, metavar="N", help="decode workers; as --prefill"),
        group.add_argument("--both", type=_count, metavar="N", help="workers that do both; default 0, or 1 in "
                           "place of the two"),
        group.add_argument("--api-server-count", "-asc", type=positive, metavar="N", default=1,
                           help="HTTP servers that share --port, each with a router of its own (Linux)"),
        group.add_argument("--tls", action="store_true", help="mutual TLS between the services, with own certificates"),
        group.add_argument("--verbose", action="store_true", help="show the services' logs, as --log-level debug does"),
        group.add_argument("--state-file", type=Path, metavar="PATH", help="a JSON file that lists the ready services"),
    ):  # fmt: skip
        parser.settable(action)
    add_flags(parser, SERVE_FLAGS)
    for action in add_others(parser.add_argument_group("of vLLM, for what is so anyway")):
        parser.settable(action)
    parser.set_defaults(parser=parser, run=_run, **defaults)


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on several flags: the model, its served name, how many workers of each role (any_workers:
    nobody said).

    Ends with exit code 2 where they contradict each other.
    """
    elsewhere = args.parser.get_default("model")  # what environment or file say yields to MODEL
    if args.model_tag is not None and args.model not in (None, elsewhere, args.model_tag):
        args.parser.error(f"MODEL is {args.model_tag} but --model is {args.model}; give one of them")
    refuse_otherwise(args, args.parser)
    if args.enable_log_requests and args.disable_log_requests:
        args.parser.error("--enable-log-requests and --disable-log-requests contradict each other")
    model = args.model_tag or args.model
    if model is None:
        if greedy := getattr(args, "greedy", None):
            args.parser.error(f"{greedy} takes all the words after it; give MODEL before it, or commas between values")
        model = str(demo_model())
        args.served_model_name = args.served_model_name or "pagewire-demo"
    args.model = model
    args.any_workers = (args.prefill, args.decode, args.both) == (None, None, None)
    args.both = args.both or 0
    pair = 0 if args.both else 1
    args.prefill = pair if args.prefill is None else args.prefill
    args.decode = pair if args.decode is None else args.decode
    if args.decode + args.both == 0:
        args.parser.error("no worker can decode; give --decode or --both at least one")
    if args.api_server_count > 1 and sys.platform != "linux":
        args.parser.error("--api-server-count needs Linux: elsewhere one server gets all connections to a shared port")
    if args.api_server_count > 1 and args.seed is not None:
        args.parser.error("--seed needs one router, which counts requests; leave it or --api-server-count out")
    return args


def demo_model() -> Path:
    """The demo model of the checkout, or the copy inside the installed package. Raises StartupError if neither is."""
    package = Path(__file__).resolve().parent
    candidates = (package.parents[2] / "models" / "pagewire-demo", package / "demo_model")
    for path in candidates:
        if (path / "config.json").is_file():
            return path
    raise StartupError("the demo model is not installed; name a model: pagewire serve path-or-hub-id")


def _give_way_to_steps() -> None:
    """For this process and all that it starts: whoever wakes up waits for a turn and takes no core away at once.

    On a CPU a token's way through worker, router and bridge needs the cores that compute the next one. A thread that is
    stopped in the middle of a piece of a step holds up the others; between two pieces it makes room by itself, every
    30 microseconds (`threads.h`).
    """
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    args = settle(args)
    for sentence in without_effect(args):
        print(sentence, flush=True)
    zygote = None
    if helps(args):
        _give_way_to_steps()
        zygote = Zygote()  # now: what it imports takes longest of all
    try:
        from pagewire_cli.supervisor import serve

        serve(args, started, zygote)
    finally:
        if zygote:
            zygote.close()
