"""The end of a process that has been asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading

import structlog

log = structlog.get_logger(__name__)


def exit_within(seconds: float) -> None:
    """Ends the process after `seconds`, whatever still runs; a clean end before that makes it void.

    Stopping has a bound: what is left by then (a connection to a dead peer that will not close) holds
    nothing that a client waits for, and an orchestrator's next step is SIGKILL.
    """

    loop: asyncio.AbstractEventLoop | None = None
    with contextlib.suppress(RuntimeError):
        loop = asyncio.get_running_loop()

    def end() -> None:
        tasks = [repr(task.get_coro()) for task in asyncio.all_tasks(loop)] if loop else []
        log.warning("something would not close; ending the process", after_s=seconds, tasks=tasks)
        os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
