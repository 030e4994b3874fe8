"""`pagewire bench`: latency and throughput of any server with an OpenAI API, with the flags of `vllm bench serve`.

Prompts of the data set `random` are words; two requests before the measurement ask the server's own `usage` how many
tokens a word makes, so that no tokenizer is needed and lengths are right on average. Results use what `usage` says.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from pagewire_core.command_line import Parser
from pagewire_core.errors import StartupError
from pagewire_core.flags import number, port, positive, seconds

_rate = number("rate", float, lambda x: x > 0, "must be positive")
_ratio = number("ratio", float, lambda x: 0 <= x < 1, "must be in [0, 1)")
_METRICS = ("ttft", "tpot", "itl", "e2el")
_GOODPUT = ("ttft", "tpot", "e2el")
_EXAMPLES = """\
examples:
  pagewire bench --num-prompts 64 --max-concurrency 8              a closed loop with eight in flight
  pagewire bench --request-rate 5 --random-input-len 512 --goodput ttft:500 tpot:50
  pagewire bench --base-url https://example.org --backend openai-chat --model NAME --save-result
  pagewire bench --dataset-name sharegpt --dataset-path ShareGPT_V3.json --num-prompts 200

OPENAI_API_KEY, if set, is sent as the bearer token. SSL_CERT_FILE names authorities to trust beside the system's."""


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser: Parser = subcommands.add_parser(
        "bench",
        help="measure a running server: TTFT, TPOT, ITL, throughput",
        usage="pagewire bench [flags]",
        description="Measures any server with an OpenAI API as its clients see it, and prints the table of `vllm bench "
        "serve`, whose\nflags these are.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("kind", nargs="?", choices=("serve",), metavar="serve", help="may be said, as to vLLM")
    _add_server(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("the load"))
    _add_data(parser.add_argument_group("the prompts"))
    _add_result(parser.add_argument_group("the result"))
    parser.set_defaults(parser=parser, run=_run)


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", metavar="URL", help="of the server; default: http://HOST:PORT")
    group.add_argument("--host", default="127.0.0.1", help="of the server, if there is no --base-url")
    group.add_argument("--port", type=port, default=8000, help="of the server, if there is no --base-url")
    group.add_argument("--model", help="default: the first one that the server lists")
    group.add_argument(
        "--backend", choices=("openai", "openai-chat", "vllm"), default="openai", help="completions or chat"
    )
    group.add_argument("--endpoint", metavar="PATH", help="default: /v1/completions or /v1/chat/completions")


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-prompts", type=positive, metavar="N", help="default: 1000, or no limit with --duration")
    group.add_argument("--duration", type=seconds, metavar="S", help="send no more after this many seconds")
    group.add_argument(
        "--request-rate", type=_rate, default=float("inf"), metavar="R", help="arrivals per second; inf: all at once"
    )
    group.add_argument(
        "--burstiness", type=seconds, default=1.0, metavar="B", help="of arrivals: 1 is Poisson, less is burstier"
    )
    group.add_argument("--max-concurrency", type=positive, metavar="N", help="requests in flight, at most")
    group.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before, that are not counted")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same one asks the same again: caches have it"
    )


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-name", choices=("random", "sharegpt", "custom"), default="random", help="what is asked"
    )
    group.add_argument(
        "--dataset-path", type=Path, metavar="FILE", help="ShareGPT's JSON; custom: lines of JSON with prompt"
    )
    group.add_argument("--random-input-len", type=positive, default=1024, metavar="N", help="prompt tokens")
    group.add_argument("--random-output-len", type=positive, default=128, metavar="N", help="tokens of an answer")
    group.add_argument(
        "--random-range-ratio", type=_ratio, default=0.0, metavar="F", help="lengths lie within 1-F and 1+F of these"
    )
    group.add_argument(
        "--random-prefix-len", type=int, default=0, metavar="N", help="tokens before these that all prompts share"
    )
    group.add_argument("--sharegpt-output-len", type=positive, metavar="N", help="default: as long as the answer there")
    group.add_argument("--custom-output-len", type=positive, default=256, metavar="N", help="tokens of an answer")
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="answers have their full length"
    )


def _add_result(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics", type=_metrics, default="ttft,tpot,itl", metavar="M,...", help="of ttft, tpot, itl, e2el"
    )
    group.add_argument(
        "--metric-percentiles", type=_percentiles, default="99", metavar="P,...", help="to print and save"
    )
    group.add_argument(
        "--goodput", type=_target, nargs="+", default=(), metavar="M:MS", help="count requests within these times"
    )
    group.add_argument("--save-result", action="store_true", help="write the numbers to a JSON file")
    group.add_argument("--result-dir", type=Path, metavar="DIR", help="where it goes; default: here")
    group.add_argument("--result-filename", metavar="NAME", help="default: made of model, load and time")


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(_METRICS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(_METRICS)}")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError("must be numbers between 0 and 100, comma-separated")
    return values


def _target(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        if name in _GOODPUT:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"write NAME:MILLISECONDS, with one of {', '.join(_GOODPUT)}")


def _run(args: argparse.Namespace) -> None:
    from pagewire_core.startup import allow_connections

    from pagewire_cli.load.client import ServerUnfit  # HTTP and JSON: not wanted by the other commands
    from pagewire_cli.load.report import table
    from pagewire_cli.load.run import run

    if args.dataset_name != "random" and args.dataset_path is None:
        args.parser.error(f"--dataset-name {args.dataset_name} needs --dataset-path")
    try:
        allow_connections()
        result = asyncio.run(run(args))
    except (ServerUnfit, OSError, ValueError) as error:
        raise StartupError(str(error) or type(error).__name__) from None
    print("\n".join(table(result, args.percentile_metrics, args.metric_percentiles)))
    for what, count in result["error_counts"].items():
        print(f"{count} x {what}")
    if args.save_result:
        path = (args.result_dir or Path()) / (args.result_filename or _file_name(result))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise StartupError(f"cannot save the result: {error}") from None
    if not result["completed"]:
        raise StartupError("no request completed")


def _file_name(result: dict[str, Any]) -> str:
    model = str(result["model_id"]).rpartition("/")[2]
    concurrency = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] else ""
    return f"{result['backend']}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}.json"
