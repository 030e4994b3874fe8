"""The failure matrix: what dies, at which stage of a request's life, and what the client then gets.

Each cell is one request on two prefill and two decode workers, real processes, one of which is killed or frozen,
or damages what it handles, at the named point. The client must have exactly the tokens of the reference, or (only
where the table says so) a clear error, within a time; afterwards nothing may be held anywhere by anybody.

    S1 reserved, S2 queued on the prefill worker, S3 computing and streaming, S4 sealed, S5 decoding

A few cells run with every test run, all of them with `make test-faults`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster, running
from streams import prompt_of
from tiny_models import reference_greedy

FLAGS = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=8", "--threads=1",
         "--transfer-timeout=4")  # fmt: skip
WITHIN_S = 20.0  # several times what a frozen process costs (about 4 s), far from the time-outs of last resort
PROMPT, NUM_OUTPUT = prompt_of(300, 1), 60

SLOW_PREFILL = "step:prefill:delay"  # else several steps go into one chunk, and there are too few chunks to choose from


@dataclass(frozen=True)
class Fault:
    """`at` names stage, rank and action; `then` the role that is struck once that has happened, if not itself."""

    at: str
    options: str = ""
    then: str = ""
    error: bool = False  # the client may be told of it
    quick: bool = False  # part of every test run
    num_output: int = NUM_OUTPUT


# Where a process has to be struck, so that it happens in that stage. A delay holds the request there meanwhile.
PREFILL = {
    "S1": Fault("reserve:decode:delay", then="prefill"),
    "S2": Fault("queue:prefill:"),
    "S3 computing": Fault("step:prefill:", "after=3", quick=True),
    "S3 computing for one token": Fault("step:prefill:", "after=3", quick=True, num_output=1),  # nothing is sent
    "S3 streaming": Fault("chunk-sent:prefill:", "after=1"),
    "S3 announced": Fault("bytes-sent:prefill:", "after=1"),
    "S3 first token": Fault("first-token:prefill:"),
    "S4": Fault("release:prefill:"),
    "S5": Fault("step:decode:delay", "after=5", then="prefill"),
}
DECODE = {
    "S1": Fault("reserve:decode:"),
    "S2": Fault("queue:prefill:delay", then="decode"),
    "S3 binding": Fault("bind:decode:"),
    "S3 streaming": Fault("chunk-received:decode:", "after=1", quick=True),
    "S4": Fault("sealed:decode:"),
    "S5": Fault("step:decode:", "after=9", quick=True),
    "S5 end": Fault("release:decode:"),
}
ELSEWHERE = {
    "S1": Fault("reserve:decode:delay"),
    "S2": Fault("queue:prefill:delay"),
    "S3": Fault("chunk-sent:prefill:delay", "after=1"),
    "S4": Fault("sealed:decode:delay"),
    "S5": Fault("step:decode:delay", "after=5"),
}
WIRE = {
    "lane thread of prefill fails": {"S3": Fault("bytes-sent:prefill:refuse", "after=1")},
    "lane thread of decode fails": {"S3": Fault("chunk-received:decode:refuse", "after=1")},
    "lane thread of prefill hangs": {"S3": Fault("bytes-sent:prefill:delay", "after=1 seconds=7")},
    "lane thread of decode hangs": {"S3": Fault("chunk-received:decode:delay", "after=1 seconds=7")},
    # Its connections still answer: only its silence tells, after 10 s.
    "loop of prefill stands still": {"S2": Fault("queue:prefill:delay", "seconds=14")},
    "loop of decode stands still": {"S4": Fault("sealed:decode:delay", "seconds=14")},
    "chunk lost": {"S3": Fault("chunk-sent:prefill:drop", "after=1")},
    "chunk sent twice": {"S3": Fault("chunk-sent:prefill:duplicate", "after=1")},
    "chunk damaged": {"S3": Fault("chunk-received:decode:flip", "after=1")},
    "chunk damaged twice": {"S3": Fault("chunk-received:decode:flip", "after=1 times=2", quick=True)},
    "decode out of credits": {"S1": Fault("reserve:decode:refuse")},
    "decode out of pages": {"S2": Fault("bind:decode:refuse", quick=True)},
    "index write lost": {"S5": Fault("redis-write:decode:drop")},
}


def struck(fault: Fault, action: str, role: str = "") -> Fault:
    """The same place in time with another blow; `role`: whom it hits, once the place is reached."""
    at = fault.at + action if fault.at.endswith(":") else fault.at
    then = f"{action} {role or fault.then}" if role or fault.then else ""
    return replace(fault, at=at, then=then, error=role == "router")


def matrix() -> Iterator[tuple[str, str, Fault]]:
    for action, what in (("kill", "killed"), ("stop", "frozen")):
        for role, places in (("prefill", PREFILL), ("decode", DECODE)):
            for stage, fault in places.items():
                yield f"{role} {what}", stage, struck(fault, action)
        for role in ("router", "redis"):
            for stage, fault in ELSEWHERE.items():
                yield f"{role} {what}", stage, struck(fault, action, role)
    for what, places in WIRE.items():
        for stage, fault in places.items():
            yield what, stage, fault


CELLS = [
    pytest.param(fault, id=f"{what}-{stage}", marks=[] if fault.quick else pytest.mark.faults)
    for what, stage, fault in matrix()
]
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    made = Cluster(llama, tmp_path_factory.mktemp("matrix"), prefill=2, decode=2, worker_flags=FLAGS,
                   router_flags=(*PAIRS, "--transfer-timeout=4"), with_faults=True)  # fmt: skip
    async with running(made):
        await made.raise_ceiling()
        yield made


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[int]:
    return reference_greedy(llama, PROMPT, NUM_OUTPUT)[0]


async def answer(cluster: Cluster, salt: str, num_output: int) -> tuple[list[int], str]:
    """The tokens that a streaming client gets, and the sentence of the error that ends them, if one does.

    salt: keeps what earlier requests left in prefix caches from being used.
    """
    body = {"prompt": PROMPT, "cache_salt": salt, "temperature": 0, "max_tokens": num_output, "ignore_eos": True,
            "return_token_ids": True, "stream": True}  # fmt: skip
    tokens: list[int] = []
    async with cluster.http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return [], json.loads(await response.aread())["error"]["message"]
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                return tokens, event["error"]["message"]
            tokens += event["choices"][0].get("token_ids", []) if event["choices"] else []
    return tokens, ""


async def close_circuits(cluster: Cluster) -> None:
    """A new router: one that leaves workers alone after so many faults would keep the next request from its place."""
    metrics = await cluster.metrics()
    if any(metrics.get(f"pagewire_circuits_open{{leg={leg}}}", 0.0) for leg in ("prefill", "transfer", "decode")):
        cluster.processes["router"].kill()
        await cluster.mend()


async def strike(cluster: Cluster, blow: str, armed: Path) -> None:
    """Kills or freezes the processes of a role that have something to do with the request, once the fault was had."""
    action, role = blow.split()
    while armed.exists():
        await asyncio.sleep(0.005)
    for process in [p for p in cluster.processes.values() if p.role == role]:
        if role != "decode" or (await cluster.worker_stats(process)).open_transfers:
            process.kill() if action == "kill" else process.freeze()


@pytest.mark.parametrize("fault", CELLS)
async def test_tokens_are_exact_or_the_error_is_clear_and_nothing_stays_behind(
    cluster: Cluster, expected: list[int], fault: Fault, request: pytest.FixtureRequest
) -> None:
    assert cluster.faults is not None
    armed = cluster.faults / fault.at
    armed.write_text(fault.options)
    (cluster.faults / SLOW_PREFILL).write_text("times=1000 seconds=0.01")
    striking = asyncio.create_task(strike(cluster, fault.then, armed)) if fault.then else None
    began = time.monotonic()
    try:
        async with asyncio.timeout(WITHIN_S):
            tokens, error = await answer(cluster, request.node.name, fault.num_output)
            if striking:
                await striking
        print(f"\n{request.node.callspec.id}: {time.monotonic() - began:.1f} s {error}")
    finally:
        had = not armed.exists()
        for file in cluster.faults.iterdir():
            file.unlink(missing_ok=True)
        await cluster.mend()
        await close_circuits(cluster)
    assert had, "the request did not come to this point"
    if error:
        assert fault.error, error
        assert tokens == expected[: len(tokens)]
    else:
        assert tokens == expected[: fault.num_output]
    await cluster.settle()
