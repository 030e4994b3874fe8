"""What a broken pair held is given back soon: by itself Python may look for it in hours."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from kv_endpoints import FIRST, LAYOUT, ends, random_kv, until
from pagewire_core.errors import PagewireError
from pagewire_transfer.shm_lane import ShmLane

MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="reads /proc")


def num_lanes() -> int:
    return MAPS.read_text().count("/memfd:pagewire")


def num_sockets() -> int:
    return sum(connection.status == "ESTABLISHED" for connection in psutil.Process().net_connections("tcp"))


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("breaks", ["send", "recv"])
async def test_the_memory_of_a_broken_pair_is_unmapped(
    breaks: str, no_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = num_lanes()
    async with ends("shm", chunk_bytes=400) as both:
        outgoing = await both.open(random_kv(LAYOUT, 30))
        await until(lambda: num_lanes() == before + 2)

        def broken(lane: ShmLane, *_: object) -> None:
            lane._wait(lambda: False, 0.01)

        sockets = num_sockets()
        with monkeypatch.context() as patch:
            patch.setattr(ShmLane, breaks, broken)
            with pytest.raises(PagewireError):
                await outgoing.seal(FIRST)
        await until(lambda: both.metric("pairs") == 0)
        del outgoing
        await until(lambda: num_lanes() == before)
        await until(lambda: num_sockets() == sockets - 2)  # both ends of the connection are in this process
