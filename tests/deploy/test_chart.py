"""The chart and the overlays, rendered by the real tools, against Kubernetes' own schemas: make test-deploy."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from manifests import breaches, of_kind, parsed, read, workloads

helm_python = pytest.importorskip("helm_python", reason="helm-python-sdk renders the chart: make test-deploy")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="has Kubernetes' schemas: make test-deploy")

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "pagewire"
VERSIONS = ("1.31", "1.34", "1.37")  # of Kubernetes: the oldest, one between, the newest


def render(values: dict[str, Any], name: str = "llm") -> list[dict[str, Any]]:
    found = helm_python.Chart.load(str(CHART)).render(values, name=name, namespace="serving")
    return [d for path, text in found.items() if not path.endswith("NOTES.txt") for d in read(text)]


def check_schemas(documents: list[dict[str, Any]], strict: bool = True) -> int:
    """How many have one; those of custom resources are not known here."""
    checked = 0
    for document in documents:
        for version in VERSIONS:
            if document["apiVersion"].split("/")[0].count(".") and "k8s.io" not in document["apiVersion"]:
                continue
            kubernetes_validate.validate(document, version, strict=strict)
            checked += 1
    return checked


SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "plain text, own Redis, no edge": {
        "tls": {"mode": "none"}, "edge": {"enabled": False}, "redis": {"enabled": False, "url": "redis://mine:6379/0"},
    },
    "everything": {
        "model": "Qwen/Qwen3-8B", "servedModelName": "qwen", "tensorParallelism": 2,
        "resources": {"requests": {"cpu": "8"}, "limits": {"nvidia.com/gpu": 2, "memory": "64Gi"}},
        "prefill": {"autoscaling": {"enabled": True}, "args": ["--max-num-seqs=16"], "nodeSelector": {"gpu": "h100"}},
        "decode": {"autoscaling": {"enabled": True}, "tolerations": [{"key": "x", "operator": "Exists"}]},
        "tls": {"mode": "certManager"}, "modelCache": {"type": "pvc", "storageClass": "shared"},
        "hfTokenSecret": {"name": "hf"}, "apiKeysSecret": "keys", "priorityClassName": "serving",
        "edge": {"tlsSecret": "edge", "clientCaSecret": "clients",
                 "service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
        "redis": {"urlSecret": {"name": "redis"}}, "imagePullSecrets": [{"name": "pull"}],
        "image": {"registry": "registry.example/llm", "tag": "1.2.3"},
        "monitoring": {"podMonitor": True, "rules": True, "dashboards": True, "labels": {"release": "prom"},
                       "otlpTracesEndpoint": "http://collector:4317"},
        "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"who": "clients"}}}]},
        "podLabels": {"team": "a"}, "podAnnotations": {"b": "c"},
    },
    "existing secrets": {"tls": {"mode": "secrets"}, "modelCache": {"type": "pvc", "existingClaim": "models"}},
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_every_set_of_values_makes_valid_manifests_that_keep_to_the_policy(name: str) -> None:
    documents = render(SETS[name])
    assert check_schemas(documents) > 40
    assert breaches(documents) == []
    for component, template in workloads(documents).items():
        if component != "redis":
            parsed(template["spec"]["containers"][0])


def test_the_schemas_are_looked_at() -> None:
    [document, *_] = of_kind(render({}), "Deployment")
    document["spec"]["replicaz"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schemas([document])


@pytest.mark.parametrize("limits", [{"nvidia.com/gpu": 2}, {"nvidia": {"com/gpu": 2}}])
def test_the_three_settings_of_the_comparison_are_taken_literally(limits: dict[str, Any]) -> None:
    """--set model=… --set tensorParallelism=2 --set resources.limits.nvidia\\.com/gpu=2, in quotes or without."""
    documents = render({"model": "org/model", "tensorParallelism": 2, "resources": {"limits": limits}})
    check_schemas(documents)
    assert breaches(documents) == []
    for role in ("prefill", "decode"):
        pod = workloads(documents)[role]["spec"]
        [container] = pod["containers"]
        flags = parsed(container)
        assert (flags.model, flags.tensor_parallel_size) == ("org/model", 2)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
        assert container["image"].startswith("pagewire-worker-cuda:")
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert parsed(workloads(documents)["router"]["spec"]["containers"][0]).model == "org/model"


def test_a_worker_has_as_many_threads_as_it_has_cores_of_its_node() -> None:
    """Its request is told to it; a limit it sees itself."""
    threads = {"name": "PAGEWIRE_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}}}
    by_request, by_limit = (
        workloads(render({"resources": resources}))["decode"]["spec"]["containers"][0]["env"]
        for resources in ({}, {"limits": {"cpu": 4}})
    )
    assert threads in by_request
    assert "PAGEWIRE_THREADS" not in {variable["name"] for variable in by_limit}


def test_certificates_that_helm_makes_are_taken_by_a_real_service() -> None:
    """One authority, and for each role a certificate with its name and the key that belongs to it."""
    import base64

    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    secrets = {d["metadata"]["name"]: d["data"] for d in of_kind(render({}), "Secret")}
    assert len({data["ca.crt"] for data in secrets.values()}) == 1
    for role in ("router", "worker", "bridge", "client", "operator"):
        data = {name: base64.b64decode(text) for name, text in secrets[f"llm-pagewire-{role}-tls"].items()}
        certificate, ca = (x509.load_pem_x509_certificate(data[name]) for name in ("tls.crt", "ca.crt"))
        certificate.verify_directly_issued_by(ca)
        assert certificate.public_key() == load_pem_private_key(data["tls.key"], None).public_key()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [f"{role}.pagewire.internal"]


@pytest.mark.parametrize(
    ("keys", "tls", "clients", "is_open"),
    [("", "", "", True), ("keys", "", "", False), ("keys", "edge", "", False), ("keys", "edge", "clients", True)],
)
def test_no_api_key_is_got_around_by_the_native_api(keys: str, tls: str, clients: str, is_open: bool) -> None:
    """gRPC has no keys: where HTTP asks for one, the gRPC port asks for a certificate or is closed."""
    documents = render({"apiKeysSecret": keys, "edge": {"tlsSecret": tls, "clientCaSecret": clients}})
    flags = parsed(workloads(documents)["edge"]["spec"]["containers"][0])
    assert bool(flags.routers) == is_open
    [service] = [d for d in of_kind(documents, "Service") if d["metadata"]["name"] == "llm-pagewire"]
    assert ("grpc" in [port["name"] for port in service["spec"]["ports"]]) == is_open


@pytest.mark.parametrize("values", [{"tensorParalelism": 2}, {"tls": {"mode": "off"}}, {"prefill": {"replica": 2}}])
def test_a_misspelt_value_is_told(values: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="schema"):
        render(values)


def test_one_value_has_every_service_send_its_spans() -> None:
    documents = render({"monitoring": {"otlpTracesEndpoint": "http://collector:4317"}})
    for role in ("prefill", "decode", "router", "bridge"):
        [container] = workloads(documents)[role]["spec"]["containers"]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert variables["PAGEWIRE_OTLP_TRACES_ENDPOINT"] == "http://collector:4317"


def test_prometheus_reaches_the_edge_beside_the_clients_that_are_named() -> None:
    """It asks one of the edges for /metrics."""
    who = {name: [{"namespaceSelector": {"matchLabels": {"who": name}}}] for name in ("clients", "prometheus")}
    documents = render({"monitoring": {"podMonitor": True}, "networkPolicy": who})
    [edge] = [d for d in of_kind(documents, "NetworkPolicy") if d["metadata"]["name"].endswith("-edge")]
    allowed = [rule["from"] for rule in edge["spec"]["ingress"] if {"port": 8000, "protocol": "TCP"} in rule["ports"]]
    assert allowed == [who["clients"], who["prometheus"]]


def test_the_edge_is_scraped_by_its_address_whatever_names_its_certificate_has() -> None:
    values = {"edge": {"tlsSecret": "public"}, "monitoring": {"podMonitor": True}}
    [monitor] = of_kind(render(values), "ServiceMonitor")
    [endpoint] = monitor["spec"]["endpoints"]
    assert (endpoint["scheme"], endpoint["tlsConfig"]) == ("https", {"insecureSkipVerify": True})


def test_what_two_edges_tell_of_the_same_workers_is_one_series() -> None:
    """Else every sum would be twice what it is. Prometheus' operator names the pod and the container of each."""
    [monitor] = of_kind(render({"edge": {"replicas": 2}, "monitoring": {"podMonitor": True}}), "ServiceMonitor")
    [endpoint] = monitor["spec"]["endpoints"]
    dropped = [r["regex"] for r in endpoint["metricRelabelings"] if r["action"] == "labeldrop"]
    assert endpoint["honorLabels"]
    assert all(any(re.fullmatch(regex, label) for regex in dropped) for label in ("pod", "container"))


@pytest.mark.parametrize(
    ("values", "service"), [({}, "llm-pagewire"), ({"edge": {"enabled": False}}, "llm-pagewire-bridge")]
)
def test_router_and_workers_are_scraped_through_one_service_also_without_an_edge(
    values: dict[str, Any], service: str
) -> None:
    """Without one the monitor once selected the edge all the same, and nobody asked for their metrics."""
    documents = render({**values, "monitoring": {"podMonitor": True}})
    [monitor] = of_kind(documents, "ServiceMonitor")
    [endpoint] = monitor["spec"]["endpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    selected = [d for d in of_kind(documents, "Service") if wanted <= d["metadata"]["labels"].items()]
    for keep in endpoint.get("relabelings", ()):
        assert (keep["action"], keep["sourceLabels"]) == ("keep", ["__meta_kubernetes_service_name"])
        selected = [d for d in selected if re.fullmatch(keep["regex"], d["metadata"]["name"])]
    assert [d["metadata"]["name"] for d in selected] == [service]
    assert endpoint["port"] in [port["name"] for port in selected[0]["spec"]["ports"]]
    pods = [p for p in of_kind(documents, "PodMonitor") if p["metadata"]["name"].endswith("-bridge")]
    [of_bridges] = pods[0]["spec"]["podMetricsEndpoints"]
    how = [{name: e.get(name) for name in ("scheme", "tlsConfig")} for e in (endpoint, of_bridges)]
    assert how[0] == (how[1] if values else {"scheme": None, "tlsConfig": None})
    assert how[1]["tlsConfig"]["serverName"] == "bridge.pagewire.internal"


@pytest.mark.parametrize(
    "values", [{}, {"edge": {"enabled": False}}, {"edge": {"enabled": False}, "tls": {"mode": "none"}}]
)
def test_the_notes_name_a_service_and_a_port_that_are_there(values: dict[str, Any]) -> None:
    found = helm_python.Chart.load(str(CHART)).render(values, name="llm", namespace="serving")
    [notes] = [text for path, text in found.items() if path.endswith("NOTES.txt")]
    [(name, port)] = re.findall(r"port-forward svc/(\S+) 8000:(\d+)", notes)
    services = {d["metadata"]["name"]: d["spec"]["ports"] for d in of_kind(render(values), "Service")}
    assert int(port) in [entry["port"] for entry in services[name]]
    in_plain = not values or values.get("tls") == {"mode": "none"}
    assert ("curl http://127.0.0.1:8000" in notes) == in_plain == ("llm-pagewire-client-tls" not in notes)


def test_helm_finds_nothing_to_complain_about() -> None:
    result = helm_python.lint(str(CHART))
    assert "ERROR" not in str(result), result


def test_two_releases_share_no_name() -> None:
    names = [{(d["kind"], d["metadata"]["name"]) for d in render({}, name)} for name in ("a", "b")]
    assert not names[0] & names[1]


@pytest.mark.parametrize("overlay", ["demo", "gpu"])
def test_every_overlay_makes_valid_manifests_that_keep_to_the_policy(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    folder = DEPLOY / "kustomize" / "overlays" / overlay
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True)
    documents = read(done.stdout)
    assert check_schemas(documents) > 40
    assert breaches(documents) == []
    assert {d["metadata"].get("namespace", "pagewire") for d in documents} == {"pagewire"}
    if overlay == "gpu":
        for role in ("prefill", "decode"):
            [container] = workloads(documents)[role]["spec"]["containers"]
            assert parsed(container).tensor_parallel_size == container["resources"]["limits"]["nvidia.com/gpu"] == 2
        assert len(of_kind(documents, "HorizontalPodAutoscaler")) == 2
