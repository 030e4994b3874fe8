"""The manifests that lie in deploy/, read as they are: no tool is needed."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import breaches, of_kind, parsed, read, selects, workloads
from pagewire_cli.launch import command_of

DEPLOY = Path(__file__).parents[2] / "deploy"
BASE = read((DEPLOY / "kustomize" / "base" / "manifests.yaml").read_text())
COMPONENTS = {"prefill", "decode", "router", "bridge", "edge", "redis"}


def test_no_pod_does_what_it_may_not() -> None:
    assert workloads(BASE).keys() == COMPONENTS
    assert breaches(BASE) == []


def broken(component: str, *path: str | int, value: Any) -> list[dict[str, Any]]:
    documents = copy.deepcopy(BASE)
    place: Any = workloads(documents)[component]["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return documents


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("securityContext", "runAsNonRoot"), False, "may run as root"),
        (("automountServiceAccountToken",), True, "has a token of the API server"),
        (("volumes", 0), {"name": "tmp", "hostPath": {"path": "/"}}, "mounts the node's disk"),
        (("terminationGracePeriodSeconds",), 30, "is killed before it may have ended"),
        (("containers", 0, "resources"), {}, "has no limit of memory or asks for no CPU"),
        (("containers", 0, "image"), "worker:latest", "has an image without a version: worker:latest"),
        (("containers", 0, "securityContext", "readOnlyRootFilesystem"), False,
         "has capabilities or a root file system that it can write"),
        (("containers", 0, "livenessProbe", "failureThreshold"), 1,
         "may be killed because it is slow, or for draining"),
        (("containers", 0, "env", 0), {"name": "HF_TOKEN", "value": "x"}, "has the secret HF_TOKEN in its manifest"),
    ],
)  # fmt: skip
def test_what_a_pod_may_not_do_is_seen(path: tuple[str | int, ...], value: Any, complaint: str) -> None:
    assert breaches(broken("decode", *path, value=value)) == [f"decode: {complaint}"]


def test_every_program_knows_the_flags_and_variables_that_it_is_given() -> None:
    pods = workloads(BASE)
    read_as = {name: parsed(pod["spec"]["containers"][0]) for name, pod in pods.items() if name != "redis"}
    assert (read_as["prefill"].role, read_as["decode"].role) == ("prefill", "decode")
    assert {read_as[name].tls_ca for name in ("prefill", "decode", "router", "bridge")} == {"/tls/ca.crt"}
    assert read_as["bridge"].ssl_cert_reqs == 2 and read_as["bridge"].router == "pagewire-router:9000"
    assert read_as["router"].redis_url.startswith("rediss://")
    assert read_as["edge"].bridges == "pagewire-bridge-pods:8000"


def test_services_budgets_and_policies_select_pods_that_are_there() -> None:
    pods = workloads(BASE)
    for document in of_kind(BASE, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = document["spec"]
        selector = (
            spec["selector"]
            if document["kind"] == "Service"
            else (spec.get("selector") or spec["podSelector"])["matchLabels"]
        )
        selected = [name for name, template in pods.items() if selects(selector, template)]
        assert len(selected) == 1, document["metadata"]["name"]
        names = {port["name"] for c in pods[selected[0]]["spec"]["containers"] for port in c["ports"]}
        numbers = {port["containerPort"] for c in pods[selected[0]]["spec"]["containers"] for port in c["ports"]}
        if document["kind"] == "Service":
            assert all(port["targetPort"] in names | numbers for port in spec["ports"])


def test_nobody_reaches_a_pod_that_need_not() -> None:
    """Each policy has callers; redis, routers and bridges are closed to the world."""
    allowed: dict[str, set[str]] = {}
    for policy in of_kind(BASE, "NetworkPolicy"):
        component = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        allowed[component] = {
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for rule in policy["spec"]["ingress"] for peer in rule.get("from", [])
        }  # fmt: skip
        if component != "edge":
            assert all(rule.get("from") for rule in policy["spec"]["ingress"])
    workers = {"prefill", "decode"}
    assert allowed == {
        "redis": {*workers, "router", "bridge"}, "router": {"bridge", "edge"}, "bridge": {"edge"},
        "prefill": {*workers, "router"}, "decode": {*workers, "router"}, "edge": set(),
    }  # fmt: skip


def test_certificates_name_the_roles_that_services_ask_for() -> None:
    made = read((DEPLOY / "kustomize" / "components" / "cert-manager" / "certificates.yaml").read_text())
    names = {d["spec"]["secretName"]: d["spec"].get("dnsNames", []) for d in of_kind(made, "Certificate")}
    for name, template in workloads(BASE).items():
        [secret] = [v["secret"]["secretName"] for v in template["spec"]["volumes"] if v["name"] == "tls"]
        role = {"prefill": "worker", "decode": "worker", "edge": "client"}.get(name, name)
        assert (f"{role}.pagewire.internal" if role != "redis" else "pagewire-redis") in names[secret]


def test_autoscalers_read_numbers_that_the_adapter_provides() -> None:
    scalers = of_kind(
        read((DEPLOY / "kustomize/components/autoscaling/autoscalers.yaml").read_text()), "HorizontalPodAutoscaler"
    )
    wanted = {m["external"]["metric"]["name"] for d in scalers for m in d["spec"]["metrics"]}
    adapter = yaml.safe_load((DEPLOY / "kubernetes/examples/prometheus-adapter-values.yaml").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    recorded = {rule.get("record") for group in rules for rule in group["rules"]}
    assert len(wanted) == 4 and wanted == {rule["name"]["as"] for rule in adapter["rules"]["external"]}
    assert all(rule["seriesQuery"].split('"')[1] in recorded for rule in adapter["rules"]["external"])


def test_examples_are_yaml_and_point_at_what_is_there() -> None:
    services = {d["metadata"]["name"]: {p["port"] for p in d["spec"]["ports"]} for d in of_kind(BASE, "Service")}
    deployments = {d["metadata"]["name"] for d in of_kind(BASE, "Deployment")}
    for path in (DEPLOY / "kubernetes" / "examples").glob("*.yaml"):
        for document in read(path.read_text()):
            spec = document.get("spec", {})
            backends = [
                b for rule in spec.get("rules", []) if isinstance(rule, dict) for b in rule.get("backendRefs", [])
            ]
            assert all(b["port"] in services[b["name"]] for b in backends if "port" in b)
            if document.get("kind") == "ScaledObject":
                assert spec["scaleTargetRef"]["name"] in deployments
            if document.get("kind") == "ServingRuntime":
                command = command_of([a.replace("{{.Name}}", "x") for a in spec["containers"][0]["args"]], {})
                assert "--served-model-name=x" in command.arguments


def test_the_chart_takes_the_rules_and_dashboards_that_are_tested() -> None:
    files = DEPLOY / "helm" / "pagewire" / "files"
    assert (files / "rules.yml").read_text() == (DEPLOY / "prometheus" / "rules.yml").read_text()
    assert len(list((files / "dashboards").glob("*.json"))) == 5


def test_manifests_are_as_the_chart_makes_them() -> None:
    """If they differ: `make manifests`."""
    pytest.importorskip("helm_python", reason="the chart is rendered by helm-python-sdk: make test-deploy")
    spec = importlib.util.spec_from_file_location("render", DEPLOY / "kustomize" / "render.py")
    assert spec and spec.loader
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for path, text in render.rendered().items():
        assert path.read_text() == text, path
