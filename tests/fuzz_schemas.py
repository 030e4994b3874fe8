"""Many random JSON schemas through real processes: every answer is a valid instance, cut off, or a 400.

python tests/fuzz_schemas.py [how many]; prints what became of them, and fails at the first that is wrong.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from cluster import Cluster, running
from hypothesis import HealthCheck, given, settings
from json_schemas import instance_of, schemas
from tiny_models import make_model

FLAGS = ("--kv-cache-memory-bytes=32M", "--max-model-len=512", "--max-num-batched-tokens=64", "--threads=1")
AT_ONCE = 32


def draw(count: int) -> list[Any]:
    drawn: list[Any] = []

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(schemas())
    def collect(schema: Any) -> None:
        drawn.append(schema)

    while len(drawn) < count:  # hypothesis may think that it has tried all
        collect()
    return drawn[:count]


async def run(count: int) -> Counter[str]:
    results: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model", "llama")
        async with running(Cluster(model, Path(directory), worker_flags=FLAGS)) as cluster:
            todo = list(enumerate(draw(count)))
            for begin in range(0, count, AT_ONCE):
                some = (instance_of(cluster, schema, seed) for seed, schema in todo[begin : begin + AT_ONCE])
                results.update(await asyncio.gather(*some))
    return results


if __name__ == "__main__":
    for result, times in asyncio.run(run(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)).most_common():
        print(f"{times:6} {result}")
