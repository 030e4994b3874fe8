"""What the supervisor prints: one plain line per event, flushed, the same on a terminal and in a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from pagewire_cli.service import Service

_FOLLOW_S = 0.2
_PROMPT = "Tell me a short story about a fox."


def say(line: str) -> None:
    # A reader that has gone away (`pagewire serve | head`) or a full disk is no reason to stop serving.
    with contextlib.suppress(OSError):
        print(line, flush=True)


def ready(service: Service, seconds: float, phases: Mapping[str, float]) -> None:
    """One line, with the phases of the start where they are known."""
    spec = service.spec
    details = f"  ({', '.join(f'{name} {spent:.1f}' for name, spent in phases.items())})" if phases else ""
    say(f"{spec.name:<12} ready  pid {service.pid:<8} {spec.address:<22} {seconds:5.1f} s{details}")


def died(service: Service, restart_in_s: float) -> None:
    pid = service.pid or "-"
    say(f"{service.spec.name:<12} ended  pid {pid:<8} {service.last_words()}; restarts in {restart_in_s:g} s")


def curl_line(base_url: str, model: str, is_chat: bool) -> str:
    """A command for a POSIX shell that asks `model` for an answer."""
    path = "completions"
    prompt: dict[str, object] = {"prompt": "Once upon a time"}
    if is_chat:
        path, prompt = "chat/completions", {"messages": [{"role": "user", "content": _PROMPT}]}
    body = {"model": model, **prompt, "max_tokens": 64}
    return (
        f"curl {shlex.quote(f'{base_url}/v1/{path}')} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


async def follow(name: str, log_path: Path) -> None:
    """Copies what is appended to a log to stderr, line by line, until cancelled."""
    with log_path.open(errors="replace") as log:
        partial = ""
        while True:
            for line in log:
                partial += line
                if partial.endswith("\n"):
                    with contextlib.suppress(OSError):  # as in `say`
                        sys.stderr.write(f"{name} | {partial}")
                        sys.stderr.flush()
                    partial = ""
            await asyncio.sleep(_FOLLOW_S)
