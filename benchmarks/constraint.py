"""What structured output costs an engine: CPU time of masks per token, and steps with and without it.

    python benchmarks/constraint.py [MODEL] [--batch 1 8] [--rounds 5] [--out result.json]

The same engine decodes free sequences and such that follow a JSON schema, in turn; a step of the latter has the masks
of all its sequences in it. The masks are also measured alone, in CPU time of the engine's thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from llguidance import LLMatcher
from pagewire.v1 import common_pb2 as pb
from pagewire_core.model_dir import resolve_model
from pagewire_engine import engine as engine_module
from pagewire_engine.engine import Engine
from pagewire_engine.loader import load
from pagewire_engine.masks import allowed_tokens
from pagewire_engine.options import EngineOptions
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request

DEMO = Path(__file__).resolve().parents[1] / "models/pagewire-demo"
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["items"],
    "properties": {"items": {"type": "array", "minItems": 40, "items": {
        "type": "object", "additionalProperties": False, "required": ["name", "age", "color", "code"],
        "properties": {
            "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "color": {"enum": ["red", "green", "blue"]}, "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
        }}}},
}  # fmt: skip
TOKENS = 200


class Masks:
    """allowed_tokens, with a clock."""

    def __init__(self) -> None:
        self.rows: list[float] = []  # CPU seconds a row, a step each

    def __call__(self, rows: Any, vocab_size: int) -> Any:
        started = time.thread_time()
        allowed = allowed_tokens(rows, vocab_size)
        taken = time.thread_time() - started
        self.rows.append(taken / len(rows))
        return allowed


def decode(engine: Engine, constraints: Any, batch: int, constrained: bool) -> float:
    """Milliseconds of the median step."""
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_pattern": "[ ]"})
    for i in range(batch):
        params = SamplingParams(seed=i, temperature=0.8, max_tokens=TOKENS, constrained=constrained)
        request = Request(str(i), [5 + i, 6, 7, 8], b"r" * 32, params, 1, lambda event: None)
        if constrained:
            request.matchings = constraints.make_now(pb.Constraint(answer=grammar))
        engine.submit(request)
    steps: list[float] = []
    while True:
        started = time.perf_counter()
        if not engine.step():
            return median(steps) * 1e3
        steps.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loaded = load(resolve_model(str(args.model)), EngineOptions(max_model_len=1024, kv_cache_memory_bytes=256 << 20))
    engine = Engine(loaded.runner, loaded.config)
    masks = Masks()
    engine_module.allowed_tokens = masks  # type: ignore[assignment]
    results = []
    for batch in args.batch:
        decode(engine, loaded.constraints, batch, True)  # warm
        masks.rows.clear()
        free, held = [], []
        for _ in range(args.rounds):
            free.append(decode(engine, loaded.constraints, batch, False))
            held.append(decode(engine, loaded.constraints, batch, True))
        rows = sorted(masks.rows)
        microseconds = {"p50": rows[len(rows) // 2], "mean": sum(rows) / len(rows), "p99": rows[int(len(rows) * 0.99)]}
        results.append({
            "batch": batch, "step_free_ms": round(median(free), 3), "step_constrained_ms": round(median(held), 3),
            "mask_cpu_us_per_token": {name: round(value * 1e6, 1) for name, value in microseconds.items()},
        })  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
    if args.out:
        found = {"model": args.model.name, "load_average": os.getloadavg()[1], "results": results}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
