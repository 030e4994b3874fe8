"""The simulator loses nothing, repeats itself, and knows what a bad policy costs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import simulate
from hypothesis import given
from hypothesis import strategies as st
from pagewire_bench.simulator import traces
from pagewire_bench.simulator.clock import Clock
from pagewire_bench.simulator.fleet import Fleet, FleetConfig
from pagewire_bench.simulator.prefix_cache import PrefixCache
from pagewire_bench.simulator.score import score
from pagewire_router.policies import POLICIES

CONFIG = FleetConfig(3, 4, simulate.MODEL, simulate.HARDWARE)
SECONDS = 6.0


def run(policy: str, trace: str = "mixed", rate: float = 8.0, seed: int = 1) -> tuple[Fleet, list[traces.Arrival]]:
    fleet = Fleet(CONFIG, POLICIES[policy], seed)
    return fleet, fleet.run(getattr(traces, trace)(random.Random(seed), rate, SECONDS), SECONDS)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_request_ends_and_gives_back_all_it_held(policy: str) -> None:
    fleet, arrivals = run(policy)
    assert len(arrivals) > 15
    for arrival in arrivals:
        assert arrival.first_token is not None and arrival.finished is not None
        assert arrival.at < arrival.first_token < arrival.finished
    for worker in fleet.live:
        assert worker.cache.num_free == worker.cache.num_blocks
        assert not worker.is_booked and not worker.num_transfers
        assert (worker.stats.num_running, worker.stats.waiting_prefill_tokens, worker.stats.running_kv_tokens) == (
            0,
            0,
            0,
        )


def test_one_seed_gives_one_result() -> None:
    first, second = (score(run("pagewire")[1], SECONDS, simulate.MODEL) for _ in range(2))
    assert first == second
    assert first != score(run("pagewire", seed=2)[1], SECONDS, simulate.MODEL)


def test_prompts_that_share_find_their_prefix_and_computing_them_anew_shows() -> None:
    """Goodput of requests about documents: with the prefix looked for, and in turns."""
    looked, turned = (
        score(run(policy, "documents", 14.0)[1], SECONDS, simulate.MODEL).ttft_p50_s
        for policy in ("pagewire", "round_robin")
    )
    assert looked < turned / 2


def test_the_command_writes_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    simulate.main([
        "--workers", "6", "--seconds", "3", "--seeds", "1", "--traces", "bursts", "--policies", "pagewire", "prefix",
        "--processes", "1", "--out", str(out),
    ])  # fmt: skip
    runs = json.loads(out.read_text())["runs"]
    assert [(r["trace"], r["policy"]) for r in runs] == [("bursts", "pagewire"), ("bursts", "prefix")]
    assert all(0 <= r["attained"] <= 1 and r["requests"] > 0 for r in runs)
    assert "Goodput" in capsys.readouterr().out


def test_events_come_in_their_order() -> None:
    clock, seen = Clock(), []
    for seconds in (3.0, 1.0, 2.0, 1.0):
        clock.after(seconds, lambda s=seconds: seen.append((clock.now, s)))  # type: ignore[misc]
    clock.run(2.5)
    assert seen == [(1.0, 1.0), (1.0, 1.0), (2.0, 2.0)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=40))
def test_a_cache_never_holds_more_than_it_has_and_knows_what_it_told(steps: list[tuple[int, int]]) -> None:
    known: set[bytes] = set()
    cache = PrefixCache(16, known.update, known.difference_update)
    held: list[list[bytes]] = []
    for chain, length in steps:
        hashes = [bytes([chain, i]) for i in range(length)]
        hit = cache.hit(hashes)
        if not cache.has_room(hashes[:hit], length - hit) or (len(held) > 2 and chain % 2):
            if held:
                cache.release(held.pop(0), 0)
            continue
        cache.hold(hashes[:hit], length - hit)
        cache.publish(hashes[hit:])
        held.append(hashes)
        assert cache.hit(hashes) == length
        assert 0 <= cache.num_free <= 16
        assert {h for blocks in held for h in blocks} <= known and len(known) <= 16
    for blocks in held:
        cache.release(blocks, 0)
    assert cache.num_free == 16
