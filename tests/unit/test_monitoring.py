"""Alerts, dashboards and what scrapes: they ask for numbers that exist, and promtool takes them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pagewire_bridge.observe import BridgeMetrics
from pagewire_engine import metrics as engine_metrics
from pagewire_router.metrics import RouterMetrics
from pagewire_transfer.metrics import TransferMetrics
from prometheus_client import CollectorRegistry

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
ALERTS = [rule for group in RULES for rule in group["rules"] if "alert" in rule]


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def known_names() -> set[str]:
    """As Prometheus names the samples of every service."""
    workers = CollectorRegistry()
    TransferMetrics(workers)
    engine_metrics.StageMetrics(workers)
    names = {"up"} | {f"pagewire_engine_{name}" for name in engine_metrics._GAUGES}
    names |= {f"pagewire_engine_{name}_total" for name in engine_metrics._COUNTERS}
    names |= {"pagewire_kv_fetches_total", "envoy_cluster_membership_healthy", "envoy_cluster_membership_total"}
    names.add("pagewire_worker_info")
    names |= {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}
    for registry in (workers, RouterMetrics().registry, BridgeMetrics().registry):
        for family in registry.collect():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            names |= {family.name + suffix for suffix in suffixes}
    return names


def asked(expression: str) -> set[str]:
    plain = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:pagewire[a-z_0-9:]*|envoy_[a-z_0-9]+(?=[{]))", plain))


def test_documents_name_numbers_that_exist() -> None:
    known, modules = known_names(), {path.name for path in ROOT.glob("services/*/pagewire_*")}
    known |= {re.sub("_(total|bucket)$", "", name) for name in known}
    lost = []
    for document in set((ROOT / "docs").glob("*.md")) - set((ROOT / "docs").glob("migrating-from-*.md")):
        spans = re.findall(r"`(pagewire_[a-z_]+)(?:[{][^`]*[}])?`", document.read_text())
        lost += [f"{document.name}: {name}" for name in spans if name not in known | modules]
    assert not lost


def test_rules_ask_for_numbers_that_exist() -> None:
    wanted = {name for group in RULES for rule in group["rules"] for name in asked(rule["expr"])}
    assert len(wanted) > 20 and wanted <= known_names()


def test_dashboards_are_as_their_source_says_and_ask_for_numbers_that_exist() -> None:
    """If the files differ: python deploy/grafana/dashboards.py"""
    source = loaded(DEPLOY / "grafana" / "dashboards.py")
    files = {path.stem: path.read_text() for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    assert files == {name: source.rendered(dashboard) for name, dashboard in source.DASHBOARDS.items()}
    targets = [t["expr"] for text in files.values() for p in json.loads(text)["panels"] for t in p["targets"]]
    wanted = {name for expression in targets for name in asked(expression)}
    assert len(wanted) > 40 and wanted <= known_names(), wanted - known_names()


def test_every_dashboard_is_shown() -> None:
    """If one is new or other: make pictures"""
    shown = re.findall(r"!\[[^]]+\]\(images/dashboard-(\w+)\.png\)", (ROOT / "docs" / "operating.md").read_text())
    files = {path.stem for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    pictures = {path.stem.removeprefix("dashboard-") for path in (ROOT / "docs" / "images").glob("dashboard-*.png")}
    assert len(shown) == len(set(shown)) and set(shown) == files == pictures


def test_the_first_of_what_alerts_count_is_an_increase() -> None:
    """Prometheus sees none where a series appears with its first count."""
    value = RouterMetrics().registry.get_sample_value
    for outcome in ("ok", "rejected", "unavailable", "deadline", "internal"):
        assert value("pagewire_requests_total", {"outcome": outcome}) == 0
    for leg in ("reserve", "prefill", "decode"):
        assert value("pagewire_retries_total", {"leg": leg}) == 0


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert anchor == alert["alert"].lower()
    headings = re.findall(r"^## (.*)$", (ROOT / file).read_text(), re.M)
    assert alert["alert"] in headings
    assert alert["labels"]["severity"] in ("critical", "warning", "info")


def test_promtool_takes_the_rules_and_they_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run([promtool, *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
