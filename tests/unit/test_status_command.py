"""`pagewire status` shows what a router knows of its workers, its queue and its index."""

from __future__ import annotations

import argparse
import asyncio
import json

import pytest
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_cli.status import add_subcommand, report, samples, status
from pagewire_core.command_line import Parser
from pagewire_core.errors import StartupError
from pagewire_core.tokenizer import Tokenizer
from router_scene import scene

METRICS = """\
# TYPE pagewire_kv_transfer_bytes counter
pagewire_kv_transfer_bytes_total{direction="sent",instance="p1",lane="shm"} 3145728
pagewire_kv_transfer_bytes_total{direction="sent",instance="p1",lane="gloo"} 1048576
pagewire_kv_transfer_bytes_total{direction="received",instance="d1",lane="shm"} 3145728
# TYPE pagewire_redis_connected gauge
pagewire_redis_connected{instance="router"} 0
# TYPE pagewire_index_level gauge
pagewire_index_level{instance="router"} 2
# TYPE pagewire_index_age_seconds gauge
pagewire_index_age_seconds{instance="router"} 7.5
# TYPE pagewire_expected_hit_tokens counter
pagewire_expected_hit_tokens_total{instance="router"} 200
# TYPE pagewire_false_hit_tokens counter
pagewire_false_hit_tokens_total{instance="router"} 50
# TYPE pagewire_queued_prompt_tokens gauge
pagewire_queued_prompt_tokens{instance="router"} 900
"""


def arguments(*given: str) -> argparse.Namespace:
    parser = Parser(environ={})
    add_subcommand(parser.add_subparsers())
    return parser.parse_args(["status", *given])


def test_load_lanes_and_the_index_are_told() -> None:
    answer = inference_pb2.StatusResponse(running_requests=3, queued_requests=2, indexed_blocks=40)
    for name, role in (("d1", common_pb2.WORKER_ROLE_DECODE), ("p1", common_pb2.WORKER_ROLE_PREFILL)):
        ready = name == "p1"
        answer.workers.add(
            worker_id=name, role=role, ready=ready, num_running=2, num_waiting=1, free_blocks=25, total_blocks=100
        )
    queue, index, _, head, *rows = report(answer, samples(METRICS))
    assert queue == "3 requests running, 2 queued (900 prompt tokens)"
    assert index == (
        "index: 40 blocks, Redis is away, some is missing, incomplete for 7.5 s, 25.0% of expected hits false; "
        "Redis DOES NOT ANSWER"
    )
    assert head.split()[:5] == ["worker", "role", "state", "running", "waiting"]
    assert {tuple(row.split()[:3]) for row in rows} == {("p1", "prefill", "ready"), ("d1", "decode", "SUSPECT")}
    prefill = next(row for row in rows if row.startswith("p1"))
    assert "75% of 100 blocks" in prefill and "1.0 MiB gloo, 3.0 MiB shm" in prefill


async def test_the_command_asks_a_router(byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        capsys.readouterr()
        await status(arguments("--router", s.address))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "0 requests running, 0 queued (0 prompt tokens)"
        assert lines[1].endswith("; no Redis")
        assert sorted(line.split()[0] for line in lines[4:]) == ["d1", "p1"]
        await status(arguments("--router", s.address, "--json"))
        assert {w["worker_id"] for w in json.loads(capsys.readouterr().out)["workers"]} == {"p1", "d1"}
        watching = asyncio.create_task(status(arguments("--router", s.address, "--watch", "1")))
        shown = ""
        while shown.count("requests running") < 2:
            await asyncio.sleep(0.05)
            shown += capsys.readouterr().out
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    with pytest.raises(StartupError, match="did not answer"):
        await status(arguments("--router", s.address))
