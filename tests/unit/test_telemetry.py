"""Logs: what must never be in them."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAILING = """
import structlog
from pagewire_core.telemetry import configure_logging
configure_logging("test", "{log_format}")
def fail(prompt):
    raise RuntimeError("failed")
try:
    fail("top" + " " + "secret")
except RuntimeError:
    structlog.get_logger().exception("call failed")
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_in_the_log_shows_no_local_variables(log_format: str) -> None:
    """structlog's console renderer prints every frame's locals where rich is installed: prompts too."""
    code = FAILING.format(log_format=log_format)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "RuntimeError: failed" in done.stderr
    assert "top secret" not in done.stderr


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_line_that_cannot_be_written_is_lost_and_fails_nothing(log_format: str) -> None:
    """As on a full disk, or in a pipe whose reader has gone."""
    code = FAILING.format(log_format=log_format) + 'structlog.get_logger().info("goes on")\nprint("went on")'
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.stdout == "went on\n"
