"""One request can be followed through every service, and its text is in no log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cluster import PAIRS, Cluster, running
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from pagewire_core.rpc import open_channel

SECRET = "zebra quartz"


def lines(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cluster.processes[name].log.read_text().splitlines() if line.startswith("{")]


async def test_one_request_id_runs_through_all_services_and_no_prompt_is_logged(llama: Path, tmp_path: Path) -> None:
    async with running(Cluster(llama, tmp_path, router_flags=PAIRS)) as cluster:
        headers = {"x-request-id": "follow-me-7"}
        body = {"prompt": SECRET * 5, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
        response = await cluster.http.post("/v1/completions", json=body, headers=headers)
        assert response.headers["x-request-id"] == "follow-me-7"
        await cluster.http.post("/v1/completions", json=body | {"temperature": 9})
        await cluster.settle()
        found: dict[str, dict[str, Any]] = {}
        for name in ("bridge", "router", "prefill-0", "decode-0"):
            mine = [line for line in lines(cluster, name) if line.get("request_id") == "follow-me-7"]
            assert mine, f"{name} logged nothing of the request"
            found[name] = mine[-1]
        router, prefill = found["router"], found["prefill-0"]
        assert router["transferred_bytes"] == prefill["transferred_bytes"] == 60 * 384
        assert router["lane"] == prefill["lane"] == "shm"
        for stage in ("queue_ms", "prefill_ms", "transfer_ms", "decode_ms", "ttft_ms", "total_ms"):
            assert 0 <= router[stage] <= router["total_ms"] + 1
        assert SECRET not in cluster.logs()


@pytest.fixture(scope="module")
def expected_services() -> dict[str, set[str]]:
    common = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    worker = {f"pagewire.v1.{name}Service" for name in ("Prefill", "Decode", "KvChannel", "Worker")}  # in any role
    return {
        "router": common | {"pagewire.v1.InferenceService"},
        "prefill-0": common | worker,
        "decode-0": common | worker,
    }


async def test_every_service_can_be_discovered_and_reports_its_health(
    llama: Path, tmp_path: Path, expected_services: dict[str, set[str]]
) -> None:
    """What generic tools (grpcurl, buf curl, Kubernetes' gRPC probes) rely on."""
    async with running(Cluster(llama, tmp_path)) as cluster:
        for name, services in expected_services.items():
            async with open_channel(cluster.processes[name].address) as channel:
                reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
                call = reflection.ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
                )
                reply = await anext(aiter(call))
                assert {s.name for s in reply.list_services_response.service} == services
                for service in services:
                    request = health_pb2.HealthCheckRequest(service=service)
                    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING, (name, service)
