"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_imports_only_go_down() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(lint), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("package", ["pagewire_router.main", "pagewire_bridge.main", "pagewire_cli.main"])
def test_front_end_processes_start_without_torch(package: str) -> None:
    """import-linter reads our sources; this sees what third-party packages drag in too."""
    code = f"import {package}, sys; print(*[m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", ["router", "bridge", "worker"])
def test_what_is_only_for_traces_is_not_imported_without_them(package: str) -> None:
    """A tenth of a second of every start. redis-py imports it wherever it is installed; see redis_client."""
    code = f"import pagewire_{package}.main, sys; print(*[m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_fixed_folders_are_not_importable() -> None:
    """A folder `kernels` or `services` that can be imported breaks transformers and users' own packages."""
    for folder in ("kernels", "services", "protos", "tests", "deploy"):
        assert not (ROOT / folder / "__init__.py").exists()
