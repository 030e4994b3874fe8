"""A process that was asked to stop ends, even if something in it will not."""

from __future__ import annotations

import subprocess
import sys
import time

HANGS = """
import asyncio
from pagewire_core.shutdown import exit_within

async def never_closes():
    exit_within(0.2)
    await asyncio.sleep(60)

asyncio.run(never_closes())
"""
ENDS = "from pagewire_core.shutdown import exit_within; exit_within(60)"


def test_what_will_not_close_does_not_keep_the_process() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "would not close" in done.stdout + done.stderr
    assert "never_closes" in done.stdout + done.stderr, "the log does not say what would not close"
    assert time.monotonic() - started < 20


def test_a_clean_end_does_not_wait_for_the_bound() -> None:
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", ENDS], timeout=30).returncode == 0
    assert time.monotonic() - started < 20
