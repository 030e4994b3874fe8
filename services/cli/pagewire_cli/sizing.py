"""`pagewire sizing`: how many prefill and decode workers a traffic takes, and whether to have two kinds at all.

`capacity.py` has the arithmetic, with what it leaves out; this asks a running router for what steps cost on its
workers, and prints every number that was used.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pagewire_core.command_line import Parser, add_flags
from pagewire_core.errors import StartupError
from pagewire_core.flags import FLAGS, TLS_FLAGS, not_negative, number, positive, seconds

from pagewire_cli.table import table

if TYPE_CHECKING:
    from pagewire.v1 import inference_pb2

    from pagewire_cli.capacity import Estimate, Sizing

_share = number("share", float, lambda x: 0 <= x <= 1, "must be between 0 and 1")
_percentile = number("percentile", float, lambda x: 50 <= x < 100, "must be at least 50 and below 100")
_PREFILL_COSTS = ("prefill_base_ms", "prefill_ms_per_token", "prefill_ms_per_attended")
_DECODE_COSTS = ("decode_base_ms", "decode_ms_per_sequence", "decode_ms_per_kv_token")
_NEAR = 0.9  # of a target: what is that long without any waiting makes the number of workers a matter of chance
_EXAMPLES = """\
Step costs come from the workers of a running system (--router), which measure themselves, or from flags or a file
(--config; keys are the flags' names). They are those of one worker: measure on the machine that you will have, with
prompts and answers like yours, as with `pagewire bench`.

examples:
  pagewire sizing --router HOST:PORT --request-rate 20 --prompt-tokens 1000 --output-tokens 200 --ttft 500 --itl 50
  pagewire sizing --config costs.yaml --request-rate 20 --prompt-tokens 1000 --output-tokens 200 --prefix-hit 0.6

It is an estimate for workers of one kind and Poisson arrivals, at the percentile of the targets; have some workers
more, and one more than that for the one that fails."""


def add_subcommand(subcommands: argparse._SubParsersAction[Any]) -> None:
    parser: Parser = subcommands.add_parser(
        "sizing",
        help="how many workers of each kind a traffic takes",
        usage="pagewire sizing [flags]",
        description="Reckons how many prefill and decode workers a traffic takes, or workers that do both, and which "
        "is cheaper.",
        epilog=_EXAMPLES,
    )
    parser.add_config()
    for action in (*_traffic(parser), *_costs(parser)):
        parser.settable(action)
    add_flags(parser, TLS_FLAGS)
    parser.set_defaults(parser=parser, run=_run)


def _traffic(parser: Parser) -> Iterable[argparse.Action]:
    add = parser.add_argument_group("the traffic").add_argument
    yield add("--request-rate", type=seconds, required=True, metavar="R", help="requests per second")
    yield add("--prompt-tokens", type=positive, required=True, metavar="N", help="of a prompt, on average")
    yield add("--output-tokens", type=positive, required=True, metavar="N", help="of an answer")
    yield add("--prefix-hit", type=_share, default=0.0, metavar="F", help="share of prompts that a cache has")
    yield add("--variation", type=not_negative, default=0.5, metavar="F", help="of prompt lengths: deviation over mean")
    add = parser.add_argument_group("the targets").add_argument
    yield add("--ttft", type=seconds, default=1000.0, metavar="MS", help="time to the first token")
    yield add("--itl", type=seconds, default=50.0, metavar="MS", help="time between tokens of a request")
    yield add("--percentile", type=_percentile, default=90.0, metavar="P", help="of requests that keep them")


def _costs(parser: Parser) -> Iterable[argparse.Action]:
    add = parser.add_argument_group("a worker; what is not said comes from --router").add_argument
    yield add("--router", metavar="HOST:PORT", help="whose workers have measured themselves (gRPC)")
    yield add("--prefill-base-ms", type=not_negative, metavar="MS", help="of a step that computes prompts")
    yield add("--prefill-ms-per-token", type=not_negative, metavar="MS", help="and for each token of them")
    yield add(
        "--prefill-ms-per-attended", type=not_negative, metavar="MS", help="and for each token that those attend to"
    )
    yield add("--decode-base-ms", type=not_negative, metavar="MS", help="of a decode step")
    yield add("--decode-ms-per-sequence", type=not_negative, metavar="MS", help="and for each sequence in it")
    yield add("--decode-ms-per-kv-token", type=not_negative, metavar="MS", help="and for each token of those")
    yield add("--kv-tokens", type=positive, metavar="N", help="that its KV pool holds")
    yield add("--kv-bytes-per-token", type=positive, metavar="N", help="of KV")
    yield add("--max-num-seqs", type=positive, metavar="N", help="sequences that a worker runs at a time")
    default = FLAGS["max-prefill-delay-ms"].default
    yield add("--max-prefill-delay-ms", type=not_negative, default=default, metavar="MS", help="as of the worker")
    yield add("--bandwidth", type=seconds, default=1.0, metavar="GB/S", help="of the way that KV takes")


def _run(args: argparse.Namespace) -> None:
    measured: dict[str, float] = {}
    if args.router:
        from pagewire.v1 import inference_pb2  # not wanted by a calculation from flags
        from pagewire_core.tls import tls_files

        from pagewire_cli.explain import asked_of

        asked = inference_pb2.GenerateRequest(text="a", completion_default_length=True)
        tls = tls_files(args.tls_cert, args.tls_key, args.tls_ca)
        measured, origin = measured_by(asyncio.run(asked_of(args.router, tls, asked)).workers)
        print(origin)
    print("\n".join(report(sizing_of(args, measured))))


def measured_by(workers: Iterable[inference_pb2.RouteWorker]) -> tuple[dict[str, float], str]:
    """Medians of what workers say of themselves: prompts by those that compute some, decoding by those that decode.

    And a sentence about them. Raises StartupError if a cost was not measured by any.
    """
    import statistics  # takes as long to import as all of this

    from pagewire.v1 import common_pb2
    from pagewire_router.load import StepModel

    found, prior, workers = dict[str, float](), StepModel(), list(workers)
    both = common_pb2.WORKER_ROLE_BOTH
    counts = []
    for names, role, what in (
        (_PREFILL_COSTS, common_pb2.WORKER_ROLE_PREFILL, "prompts"),
        (_DECODE_COSTS, common_pb2.WORKER_ROLE_DECODE, "decoding"),
    ):
        models = [StepModel.of(w.step_cost) for w in workers if w.role in (role, both)]
        models = [m for m in models if any(getattr(m, name) != getattr(prior, name) for name in names)]
        if not models:
            raise StartupError(f"no worker has measured steps of {what} yet; send them requests (`pagewire bench`)")
        found |= {name: statistics.median(getattr(model, name) for model in models) for name in names}
        counts.append(f"{what} by {len(models)}")
    decoders = [w for w in workers if w.role in (common_pb2.WORKER_ROLE_DECODE, both)]
    found["kv_tokens"] = statistics.median(w.free_tokens + w.kv_tokens for w in decoders)
    found["kv_bytes_per_token"] = max(w.kv_bytes_per_token for w in workers)
    found["max_num_seqs"] = statistics.median(w.max_num_seqs for w in decoders)
    return found, f"Costs as measured: {', '.join(counts)} workers."


def sizing_of(args: argparse.Namespace, measured: Mapping[str, float]) -> Sizing:
    """Flags go before what was measured. Raises StartupError if a cost is in neither."""
    from pagewire_router.load import StepModel

    from pagewire_cli.capacity import Machine, Sizing, Targets, Traffic

    def value(name: str, default: float | None = None) -> float:
        given = getattr(args, name)
        known = measured.get(name, default) if given is None else given
        if known is None:
            raise StartupError(f"what steps cost is not known: give --router, or --{name.replace('_', '-')} and so on")
        return float(known)

    costs = {name: value(name) for name in (*_PREFILL_COSTS, *_DECODE_COSTS)}
    kv_tokens, max_num_seqs, kv_bytes = (int(value(n, 0)) for n in ("kv_tokens", "max_num_seqs", "kv_bytes_per_token"))
    return Sizing(
        Traffic(args.request_rate, args.prompt_tokens, args.output_tokens, args.prefix_hit, args.variation),
        Targets(args.ttft, args.itl, args.percentile),
        Machine(StepModel(**costs), kv_tokens, max_num_seqs, kv_bytes, args.bandwidth * 1e9, args.max_prefill_delay_ms),
    )


def report(sizing: Sizing) -> Iterable[str]:
    """The arithmetic, and what follows from it."""
    yield from _given(sizing)
    prefill = sizing.fewest(sizing.prefill, itl=False)
    decode = sizing.fewest(sizing.decode, ttft=False)
    both = sizing.fewest(sizing.both)
    yield from _choices("prefill workers", sizing.prefill, prefill, sizing)
    yield from _choices("decode workers", sizing.decode, decode, sizing)
    yield from _choices("workers that do both", sizing.both, both, sizing)
    yield ""
    yield from _verdict(sizing, prefill, decode, both)


def _given(sizing: Sizing) -> Iterable[str]:
    traffic, machine, model = sizing.traffic, sizing.machine, sizing.machine.model
    yield "costs of a worker, in milliseconds"
    for name in (*_PREFILL_COSTS, *_DECODE_COSTS):
        yield f"  {name.replace('_', '-')}: {getattr(model, name):.4g}"
    yield ""
    prompt_ms, busy = sizing.prompt_ms, traffic.rate * sizing.prompt_ms / 1000
    yield f"a prompt     {traffic.prompt_tokens} tokens, {traffic.cached} of them cached: {prompt_ms:.1f} ms alone"
    yield f"             {traffic.rate:g} requests/s x {prompt_ms:.1f} ms keep {busy:.2f} workers busy"
    yield (
        f"a sequence   {traffic.sequence_tokens:.0f} KV tokens on average: adds {sizing.sequence_ms:.3g} ms to a step "
        f"of {model.decode_base_ms:.3g} ms; {traffic.steps} steps"
    )
    megabytes = traffic.computed * machine.kv_bytes_per_token / 1e6
    if megabytes:
        yield (
            f"its KV       {megabytes:.1f} MB, {sizing.transfer_ms:.1f} ms at {machine.bytes_per_s / 1e9:g} GB/s: it "
            f"delays the second token by {sizing.second_token_ms:.1f} ms; {traffic.rate * megabytes:.0f} MB/s in all"
        )


def _choices(title: str, kind: Callable[[int], Estimate], fewest: Estimate | None, sizing: Sizing) -> Iterable[str]:
    """The fewest that will do, with their neighbours."""
    yield ""
    if fewest is None:
        yield f"{title}: no number keeps the targets"
        shown = [1, 2, 4, 8]
    else:
        yield f"{title}: {fewest.workers}"
        shown = [n for n in range(fewest.workers - 2, fewest.workers + 3) if n > 0]
    p = f"p{sizing.targets.percentile:g}"
    rows = []
    for e in map(kind, shown):
        mark = "*" if fewest is not None and e.workers == fewest.workers else ""
        figures = map(_number, (e.ttft_ms, e.itl_ms, e.sequences, e.peak_kv_tokens, e.gap_ms))
        rows.append([mark, e.workers, f"{e.busy:.0%}", *figures])
    head = ["", "workers", "busy", f"TTFT {p}", f"ITL {p}", "sequences", f"KV tokens {p}", "longest gap"]
    used = [i for i in range(len(head)) if i < 3 or any(row[i] != "-" for row in rows)]
    yield from (f"  {line}" for line in table([head[i] for i in used], [[row[i] for i in used] for row in rows]))
    best, targets = sizing.at_best(kind), sizing.targets
    for flag, value, target in (("ttft", best.ttft_ms, targets.ttft_ms), ("itl", best.itl_ms, targets.itl_ms)):
        if _NEAR * target < value < float("inf"):
            yield f"  --{flag} {target:g}: with nothing to wait for, {p} is {value:.0f} ms already"


def _number(value: float) -> str:
    return f"{value:.0f}" if 100 <= value < float("inf") else f"{value:.1f}" if value < 100 else "-"


def _verdict(sizing: Sizing, prefill: Estimate | None, decode: Estimate | None, both: Estimate | None) -> Iterable[str]:
    alone = sizing.machine.model.decode_ms(1, round(sizing.traffic.sequence_tokens))
    if sizing.prompt_ms > sizing.targets.ttft_ms:
        yield f"A prompt alone takes {sizing.prompt_ms:.0f} ms: no number of workers answers within --ttft."
    if alone > sizing.targets.itl_ms:
        yield f"A sequence alone takes {alone:.0f} ms a token: no number of workers keeps --itl."
    if prefill is None or decode is None:
        if both is not None:
            yield f"Only workers that do both keep the targets: {both.workers}."
        return
    split = prefill.workers + decode.workers
    pair = f"{prefill.workers} prefill + {decode.workers} decode = {split} workers"
    if both is None:
        yield f"Disaggregation pays: {pair}; no number of workers that do both keeps the targets."
        return
    if split < both.workers:
        yield f"Disaggregation pays: {pair} do what {both.workers} that do both do."
    elif split == both.workers:
        yield f"As many workers either way: {pair}, or {both.workers} that do both."
    else:
        yield f"Disaggregation does not pay in workers: {both.workers} that do both keep the targets; it takes {pair}."
    yield f"Longest gap between tokens: {decode.gap_ms:.0f} ms with two kinds of workers, {both.gap_ms:.0f} with one."
