"""What every manifest has to keep to, and how pods are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pagewire_cli import envoy_config
from pagewire_core.command_line import Parser, add_flags
from pagewire_core.flags import BRIDGE_FLAGS, ROUTER_FLAGS, WORKER_FLAGS

Tree = dict[str, Any]
_FLAGS_OF = {"router": ROUTER_FLAGS, "bridge": BRIDGE_FLAGS, "worker": WORKER_FLAGS}
_CLOSE_S = 7  # what a service takes to end when nothing runs on it any more


def read(text: str) -> list[Tree]:
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(documents: Iterable[Tree], *kinds: str) -> list[Tree]:
    return [d for d in documents if d["kind"] in kinds]


def workloads(documents: Iterable[Tree]) -> dict[str, Tree]:
    """Pod templates by component."""
    found = of_kind(documents, "Deployment", "StatefulSet")
    return {
        d["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: d["spec"]["template"] for d in found
    }


def selects(selector: Mapping[str, str], template: Tree) -> bool:
    return selector.items() <= template["metadata"]["labels"].items()


def breaches(documents: list[Tree]) -> list[str]:
    """In one line each, what a pod does that no pod of ours may."""
    return [
        f"{name}: {what}" for name, template in workloads(documents).items() for what in _breaches(template["spec"])
    ]


def _breaches(pod: Tree) -> Iterable[str]:
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "has a token of the API server"
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares a namespace with the node"
    if any("hostPath" in volume for volume in pod.get("volumes", [])):
        yield "mounts the node's disk"
    if not pod.get("topologySpreadConstraints"):
        yield "may have all replicas on one node"
    for container in pod["containers"]:
        yield from _container_breaches(container)
        yield from _end_breaches(container, pod.get("terminationGracePeriodSeconds", 30))


def _container_breaches(container: Tree) -> Iterable[str]:
    own = container.get("securityContext", {})
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    if own.get("capabilities") != {"drop": ["ALL"]} or own.get("readOnlyRootFilesystem") is not True:
        yield "has capabilities or a root file system that it can write"
    resources = container.get("resources", {})
    if "memory" not in resources.get("limits", {}) or "cpu" not in resources.get("requests", {}):
        yield "has no limit of memory or asks for no CPU"
    if not {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys():
        yield "lacks a probe"
    elif not _is_patient(container):
        yield "may be killed because it is slow, or for draining"
    if not re.fullmatch(r"[^@]+:[^:/]+|.*@sha256:[0-9a-f]{64}", container["image"]) or container["image"].endswith(
        ":latest"
    ):
        yield f"has an image without a version: {container['image']}"
    for variable in container.get("env", []):
        if re.search("TOKEN|PASSWORD|API_KEY", variable["name"]) and "valueFrom" not in variable:
            yield f"has the secret {variable['name']} in its manifest"


def _is_patient(container: Tree) -> bool:
    """Liveness asks for less than readiness does, and waits for more than a minute."""
    live, ready = container["livenessProbe"], container["readinessProbe"]
    same = {k: live[k] for k in live.keys() & {"exec", "httpGet"}} == {
        k: ready[k] for k in ready.keys() & {"exec", "httpGet"}
    }
    return live["periodSeconds"] * live["failureThreshold"] >= 60 and (not same or "tcpSocket" in live)


def _end_breaches(container: Tree, grace_s: int) -> Iterable[str]:
    arguments = " ".join(container.get("args", []))
    own = re.search(r"--graceful-termination-timeout=(\d+)", arguments)
    before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
    if grace_s < (int(own[1]) if own else 0) + int(before[-1]) + (_CLOSE_S if own else 0):
        yield "is killed before it may have ended"


def parsed(container: Tree) -> argparse.Namespace:
    """The container's flags and variables as its program reads them; SystemExit for one that does not exist."""
    environ = {v["name"]: v.get("value", "") for v in container.get("env", []) if "value" in v}
    parser = Parser(prog=container["name"], environ=environ)
    if container["name"] == "envoy":
        envoy_config.add_subcommand(parser.add_subparsers())
        return parser.parse_args(["envoy-config", "/tmp/envoy", *container["args"]])
    add_flags(parser, _FLAGS_OF[container["name"]])
    return parser.parse_args(container["args"])
