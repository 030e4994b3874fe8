"""One measurement of a server, from its arguments to its numbers."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

from pagewire_core.announced_host import address_of

from pagewire_cli.load import dataset, pace, report
from pagewire_cli.load.client import CHAT, COMPLETIONS, Outcome, ServerUnfit, Target
from pagewire_cli.load.http import Server
from pagewire_cli.load.workload import Lengths, ListedWorkload, RandomWorkload, Request

_NUM_PROMPTS = 1000


class Workload(Protocol):
    def request(self, index: int) -> Request: ...


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Numbers under vLLM's names, and the settings they belong to. Raises ServerUnfit, OSError, ValueError."""
    target = await _target(args)
    workload = await _workload(args, target)
    await pace.keep_in_flight(1, iter(range(args.num_warmups)), lambda i: target.complete(workload.request(-1 - i)))
    before = await _text(target.server, "/metrics")
    outcomes, wall_s = await _measure(args, target, workload)
    after = await _text(target.server, "/metrics")
    targets = dict(args.goodput)
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "base_url": target.server.base_url,
        "model_id": target.model,
        "server_version": await _version(target.server),
        "dataset_name": args.dataset_name,
        "num_prompts": len(outcomes),
        "random_input_len": args.random_input_len,
        "random_output_len": args.random_output_len,
        "random_range_ratio": args.random_range_ratio,
        "random_prefix_len": args.random_prefix_len,
        "seed": args.seed,
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **report.as_vllm(outcomes, wall_s, args.metric_percentiles),
        "request_goodput": report.goodput(outcomes, wall_s, targets) if targets else None,
        "kv_transfer": report.transfer(before, after, outcomes),
        "machine": report.machine(),
    }


async def _target(args: argparse.Namespace) -> Target:
    key = os.environ.get("OPENAI_API_KEY")
    base_url = args.base_url or f"http://{address_of(args.host, args.port)}"
    server = Server(base_url, {"authorization": f"Bearer {key}"} if key else {})
    is_chat = args.backend == "openai-chat"
    endpoint = args.endpoint or (CHAT if is_chat else COMPLETIONS)
    return Target(server, args.model or await _first_model(server), endpoint, is_chat, args.ignore_eos)


async def _first_model(server: Server) -> str:
    answer = await server.get("/v1/models")
    if answer.status and not answer.ok:  # as without a key
        raise ServerUnfit(answer.refusal)
    try:
        return str(answer.json()["data"][0]["id"])
    except (LookupError, TypeError):
        raise ServerUnfit(f"{server.base_url} lists no models; is it up? Else name one with --model") from None


async def _workload(args: argparse.Namespace, target: Target) -> Workload:
    if args.dataset_name == "random":
        prompt_len = Lengths.around(args.random_input_len, args.random_range_ratio)
        output_len = Lengths.around(args.random_output_len, args.random_range_ratio)
        calibration = await target.calibrate(args.seed)
        return RandomWorkload(calibration, prompt_len, output_len, args.random_prefix_len, args.seed)
    path = args.dataset_path
    try:
        if args.dataset_name == "custom":
            return ListedWorkload(dataset.custom(path, args.custom_output_len))
        count = args.num_prompts or _NUM_PROMPTS
        return ListedWorkload(await dataset.sharegpt(path, target, count, args.sharegpt_output_len, args.seed))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no {args.dataset_name} file: {error!r}") from None


async def _measure(args: argparse.Namespace, target: Target, workload: Workload) -> tuple[list[Outcome], float]:
    """What became of every request, and the seconds from the first one's start to the last one's end."""
    total = args.num_prompts or (None if args.duration else _NUM_PROMPTS)
    progress = _Progress(total)

    async def send(index: int) -> Outcome:
        outcome = await target.complete(workload.request(index))
        progress.advance()
        return outcome

    started = time.perf_counter()
    numbers: Iterator[int] = pace.indices(total, args.duration)
    if math.isfinite(args.request_rate):
        outcomes = await pace.arrive_at(
            args.request_rate, args.seed, numbers, send, args.burstiness, args.max_concurrency
        )
    else:
        outcomes = await pace.keep_in_flight(args.max_concurrency or total or _NUM_PROMPTS, numbers, send)
    progress.end()
    return outcomes, time.perf_counter() - started


class _Progress:
    """A line on a terminal that counts; nothing elsewhere."""

    def __init__(self, total: int | None) -> None:
        self._shown = sys.stderr.isatty()
        self._of = f" of {total}" if total else ""
        self._done = 0

    def advance(self) -> None:
        self._done += 1
        if self._shown:
            sys.stderr.write(f"\r{self._done}{self._of} requests")
            sys.stderr.flush()

    def end(self) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")


async def _text(server: Server, path: str) -> str:
    """Empty where the server has no such path."""
    response = await server.get(path)
    return response.body.decode(errors="replace") if response.ok else ""


async def _version(server: Server) -> str | None:
    try:
        return str(json.loads(await _text(server, "/version"))["version"])
    except (ValueError, LookupError, TypeError):
        return None
