"""What one tenant can learn of another's prompts and schemas by the time that answers take: nothing, or this fails.

    python tests/timing_probe.py [--rounds 40]

In every round somebody asks for something new, and somebody else times the same question, or one that nobody has
asked. Of another tenant the two kinds of times must be alike; of one's own they must not, or the probe is blind.
Judged by ranks (Mann and Whitney): `auc` is how often a question that was asked before is answered faster than one
that was not: 0.5 is chance, 1 always. With 40 rounds chance leaves 0.5 +- 0.21 once in 1000 probes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import certificates
from cluster import PAIRS, Cluster, running
from pagewire_bridge.keys import digest_of
from tiny_models import make_model

TENANTS = {"victim": "v", "colleague": "v", "stranger": "s"}
FLAGS = ("--kv-cache-memory-bytes=64M", "--max-model-len=2048", "--max-num-batched-tokens=2048", "--threads=1")
SIGNIFICANT = 1e-3  # a probability of chance below it is a signal
Question = Callable[[random.Random], dict[str, Any]]


def a_prompt(rng: random.Random) -> dict[str, Any]:
    """1500 tokens of text: what is cached of it is not tokenized slower, nor computed."""
    words = " ".join("".join(rng.choices("abcdefghij", k=4)) for _ in range(300))
    return {"prompt": words, "max_tokens": 1, "temperature": 0}


def a_schema(rng: random.Random) -> dict[str, Any]:
    """A form of output that takes a while to compile."""
    names = ["".join(rng.choices("abcdefghij", k=8)) for _ in range(60)]
    fields = {name: {"type": "string", "pattern": f"^[{name}]{{1,40}}$"} for name in names}
    return {"prompt": "x", "max_tokens": 1, "temperature": 0,
            "structured_outputs": {"json": {"type": "object", "properties": fields, "required": names}}}  # fmt: skip


QUESTIONS: dict[str, Question] = {"prompt": a_prompt, "schema": a_schema}


async def ask(cluster: Cluster, key: str, body: dict[str, Any]) -> float:
    """Seconds that it took."""
    begun = time.perf_counter()
    answer = await cluster.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return time.perf_counter() - begun


async def probed(cluster: Cluster, question: Question, rounds: int) -> dict[tuple[str, bool], list[float]]:
    """Seconds by who asked, and whether the victim had asked it before. The kinds take turns in random order."""
    rng = random.Random(7)
    seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
    kinds = list(itertools.product(("colleague", "stranger"), (True, False)))
    for _ in range(rounds):
        for who, known in rng.sample(kinds, len(kinds)):
            asked, other = question(rng), question(rng)
            await ask(cluster, "victim", asked if known else other)  # the same work before every probe
            seconds[who, known].append(await ask(cluster, who, asked))
    return seconds


def auc(faster: Sequence[float], slower: Sequence[float]) -> tuple[float, float]:
    """How often one of the first is below one of the second, and how probable that or more is by chance (two-sided)."""
    n, m = len(faster), len(slower)
    wins = sum((a < b) + (a == b) / 2 for a in faster for b in slower)
    sigma = math.sqrt(n * m * (n + m + 1) / 12)
    return wins / (n * m), math.erfc(abs(wins - n * m / 2) / sigma / math.sqrt(2))


def judged(seconds: dict[tuple[str, bool], list[float]]) -> dict[str, dict[str, float]]:
    told = {}
    for who in ("colleague", "stranger"):
        known, new = seconds[who, True], seconds[who, False]
        share, chance = auc(known, new)
        told[who] = {"auc": share, "chance": chance, "known_ms": statistics.median(known) * 1e3,
                     "new_ms": statistics.median(new) * 1e3}  # fmt: skip
    return told


async def main(rounds: int) -> bool:
    well = True
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        keys = [{"name": key, "tenant": tenant, "sha256": digest_of(key)} for key, tenant in TENANTS.items()]
        (directory / "keys.yaml").write_text(json.dumps(keys))
        model = make_model(directory / "model", "llama", max_position_embeddings=2048)
        cluster = Cluster(model, directory, worker_flags=FLAGS, router_flags=PAIRS, https=True,
                          tls=certificates.made(directory / "tls"),
                          bridge_flags=(f"--api-keys-file={directory}/keys.yaml",))  # fmt: skip
        async with running(cluster):
            cluster.http.headers["authorization"] = "Bearer victim"
            for kind, question in QUESTIONS.items():
                for who, told in judged(await probed(cluster, question, rounds)).items():
                    signal = told["chance"] < SIGNIFICANT
                    well &= signal == (who == "colleague")
                    print(
                        f"{kind:7} {who:10} {'SIGNAL' if signal else 'none':7}",
                        *(f"{k} {v:.3g}" for k, v in told.items()),
                    )
    print("as it must be" if well else "NOT as it must be: a stranger sees something, or the probe is blind")
    return well


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    sys.exit(not asyncio.run(main(parser.parse_args().rounds)))
