"""The timeline of a start, seen from a process that has just begun."""

from __future__ import annotations

import subprocess
import sys
import time


def test_the_first_phase_begins_with_the_process_itself() -> None:
    """The interpreter's start and the imports are most of what a user waits for."""
    code = "import time; time.sleep(0.3); from pagewire_core.startup import Timeline; t = Timeline(); t.mark('a')"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", f"{code}; print(t.phases['a'])"], capture_output=True, text=True)
    elapsed = time.monotonic() - before
    assert 0.3 <= float(done.stdout) <= elapsed + 0.02
