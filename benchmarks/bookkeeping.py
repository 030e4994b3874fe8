"""What the engine itself costs: everything of a step but the model, in microseconds of one thread.

    python benchmarks/bookkeeping.py [--out benchmarks/results/bookkeeping.json] [--rounds 7]

The model is a runner that answers at once: here the loop around it is what is measured. Times are CPU times of
the process, the least of several rounds, so a busy machine changes them little. A decode step is timed over as many
steps as a block has tokens, so that every sequence takes a block and offers one to the prefix cache once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pagewire_cli.load.report import machine
from pagewire_core.block_hash import PageKeys
from pagewire_engine.batch import Batch
from pagewire_engine.block_manager import BlockManager
from pagewire_engine.config import EngineConfig
from pagewire_engine.engine import Engine
from pagewire_engine.model_runner import Done
from pagewire_engine.sampler import Sampled
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request
from rich.console import Console
from rich.table import Table

ROOT = bytes(32)
BLOCK = 16
POOL = 100_000  # blocks
RUNNING = (1, 8, 32, 128, 512)
MAX_LEN = 131_072
_STEPS = 4 * BLOCK


class NullRunner:
    """A device that takes no time and holds nothing."""

    overlaps = False
    progress = None
    config: Any = None

    def __init__(self) -> None:
        self.cache: Any = self
        self._sampled = Sampled(7)

    def rest(self) -> None:
        pass

    def allocated(self, blocks: Sequence[int]) -> None:
        pass

    def freed(self, blocks: Sequence[int]) -> None:
        pass

    def launch(self, batch: Batch) -> Done:
        return Done([self._sampled] * len(batch.sample_rows))


def microseconds(work: Callable[[], object], times: int) -> float:
    """CPU time of `times` calls, per call."""
    begin = time.process_time_ns()
    for _ in range(times):
        work()
    return (time.process_time_ns() - begin) / times / 1e3


def request(num_prompt: int, max_tokens: int, first: int = 0) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request("bench", [first + i % 1000 for i in range(num_prompt)], ROOT, params, 1, lambda event: None)


def engine_with(running: int) -> Engine:
    """So many sequences that decode; their blocks fill up at different steps."""
    config = EngineConfig(MAX_LEN, BLOCK, POOL, 1024, 1 << 20)
    engine = Engine(NullRunner(), config, deliver=lambda outbox: None)
    for i in range(running):
        engine.submit(request(512 + i % BLOCK, 100_000, first=1000 * i))
    engine.step()
    return engine


def decode_step(running: int, rounds: int) -> float:
    engine = engine_with(running)
    return min(microseconds(engine.step, _STEPS) for _ in range(rounds))


def join_and_leave(running: int, rounds: int) -> float:
    """A request of 64 prompt tokens and one output token, beside others: what it adds to their step."""
    engine = engine_with(running)
    first = iter(range(10**6, 10**9, 64))

    def step() -> None:
        engine.submit(request(64, 1, next(first)))
        engine.step()

    alone = min(microseconds(engine.step, _STEPS) for _ in range(rounds))
    return min(microseconds(step, _STEPS) for _ in range(rounds)) - alone


def held_up(rounds: int) -> float:
    """A prompt of 100 000 tokens, most of them cached, that finds no room: what it adds to the others' steps."""
    engine = engine_with(32)
    waiting = request(100_000, 10)
    engine.submit(request(99_000, 1))
    engine.step()
    engine.external.reserve(engine.blocks.num_free - 1000)
    alone = min(microseconds(engine.step, _STEPS) for _ in range(rounds))
    engine.submit(waiting)
    engine.step()
    assert engine.load()["num_waiting"] == 1
    return min(microseconds(engine.step, _STEPS) for _ in range(rounds)) - alone


def prefix_lookup(num_tokens: int, rounds: int) -> float:
    """Finding a prompt's blocks in a full cache of 100 000; its keys are known."""
    blocks, tables = BlockManager(POOL), []
    for start in range(0, POOL, num_tokens // BLOCK):
        keys = PageKeys(ROOT, BLOCK).extend([start] * num_tokens, num_tokens)[: POOL - start]
        table = blocks.allocate(len(keys))
        tables.append((table, keys))
        for block, key in zip(table, keys, strict=True):
            blocks.register(block, key)
        blocks.release(table)
    _, keys = tables[len(tables) // 2]
    return min(microseconds(lambda: blocks.lookup(keys), 100) for _ in range(rounds))


def allocate_and_release(count: int, rounds: int) -> float:
    """Blocks of a pool of 100 000, taken and given back."""
    blocks = BlockManager(POOL)
    return min(microseconds(lambda: blocks.release(blocks.allocate(count)), 100) for _ in range(rounds))


def allocate_evicting(count: int, rounds: int) -> float:
    """Blocks of a pool of 100 000, all of which are somebody's prefix and are evicted first."""
    blocks = BlockManager(POOL)
    table = blocks.allocate(POOL)
    for block in table:
        blocks.register(block, block.to_bytes(16, "little"))
    blocks.release(table)
    return min(microseconds(lambda: blocks.allocate(count), POOL // count // rounds) for _ in range(rounds))


def measure(rounds: int) -> dict[str, float]:
    """Microseconds by what was done."""
    results: dict[str, float] = {}
    for running in RUNNING:
        results[f"decode step, {running} running"] = decode_step(running, rounds)
    for running in (1, 128):
        results[f"a request joins and leaves, {running} running"] = join_and_leave(running, rounds)
    results["a long prompt finds no room, per step"] = held_up(rounds)
    for tokens in (1024, 16_384):
        results[f"prefix lookup, {tokens} tokens"] = prefix_lookup(tokens, rounds)
    results["allocate and release 64 blocks"] = allocate_and_release(64, rounds)
    results["allocate 64 blocks, evicting 64"] = allocate_evicting(64, rounds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Microseconds of the engine's own work.")
    parser.add_argument("--rounds", type=int, default=7, help="the least of so many is reported")
    parser.add_argument("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    results = measure(args.rounds)
    table = Table("", "µs", title="Engine bookkeeping, no model")
    for name, value in results.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    if args.out:
        rounded = {name: round(value, 2) for name, value in results.items()}
        args.out.write_text(json.dumps({"machine": machine(), "microseconds": rounded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
