"""The JSON file that tells other programs what is running: see `pagewire serve --state-file`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from pagewire_cli.plan import Plan
from pagewire_cli.service import Service


def prepare(path: Path) -> None:
    """Removes what an earlier deployment left, and finds out whether `write` will be able to. Raises OSError."""
    path.unlink(missing_ok=True)
    os.close(_open(_partial(path)))
    _partial(path).unlink()


def write(path: Path, plan: Plan, services: Iterable[Service]) -> None:
    """Writes the file at once as a whole; only for the owner's eyes, as the Redis URL may hold a password.

    Raises OSError.
    """
    state = {
        "base_url": plan.base_url,
        "model": plan.model,
        "redis_url": plan.redis_url,
        "router": plan.address_of("router"),
        "supervisor_pid": os.getpid(),
        "services": [
            {
                "name": service.spec.name,
                "role": service.spec.role,
                "pid": service.pid,
                "address": service.spec.address,
                "log": str(service.log_path),
            }
            for service in services
        ],
    }
    partial = _partial(path)
    with os.fdopen(_open(partial), "w") as file:
        json.dump(state, file, indent=2)
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
