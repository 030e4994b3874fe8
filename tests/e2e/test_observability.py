"""One request can be followed through every service, and its text is in no log."""

from __future__ import annotations

import json
import shutil
import subprocess
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
        assert (await cluster.http.post("/v1/completions", json=body | {"prompt": SECRET * 50})).status_code == 400
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
        await check_familiar_names(cluster, llama)


async def check_familiar_names(cluster: Cluster, model: Path) -> None:
    """After one request of 60 tokens that was given 8, and one that was refused."""
    text = (await cluster.http.get("/metrics")).text
    totals = await cluster.metrics()
    named = f"{{model_name={model}}}"
    for name, value in {
        "vllm:prompt_tokens_total": 60, "vllm:generation_tokens_total": 8, "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:time_to_first_token_seconds_count": 1, "vllm:inter_token_latency_seconds_count": 7,
        "vllm:request_success_total": 1, "vllm:request_params_max_tokens_sum": 8, "vllm:request_params_n_sum": 1,
        "vllm:request_prefill_time_seconds_count": 1, "vllm:request_decode_time_seconds_count": 1,
        "vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, "vllm:prefix_cache_hits_total": 0,
        "vllm:request_max_num_generation_tokens_sum": 8, "vllm:iteration_tokens_total_sum": 67,
        "vllm:prefix_cache_queries_total": 60, "vllm:request_inference_time_seconds_count": 1,
    }.items():  # fmt: skip
        assert totals[name] == totals[name + named] == value, name
    assert totals["vllm:request_success_total{finished_reason=length}"] == 1
    assert 0 <= totals["vllm:kv_cache_usage_perc"] < 1
    assert totals["vllm:cache_config_info{enable_prefix_caching=True}"] == 2
    for name, value in {
        "tgi_request_count": 2, "tgi_request_success": 1, "tgi_request_failure{err=invalid_request}": 1,
        "tgi_request_input_length_sum": 60, "tgi_request_generated_tokens_sum": 8, "tgi_queue_size": 0,
        "tgi_batch_current_size": 0, "tgi_request_duration_count": 1, "tgi_request_queue_duration_count": 1,
        "tgi_request_validation_duration_count": 1, "tgi_batch_inference_count{method=prefill}": 2,
        "tgi_batch_inference_count{method=decode}": 7, "tgi_batch_inference_duration_count{method=decode}": 7,
        "tgi_request_mean_time_per_token_duration_count": 1, "tgi_request_max_new_tokens_sum": 8,
        "tgi_request_skipped_tokens_count": 1, "tgi_request_skipped_tokens_sum": 0, "tgi_batch_next_size_sum": 1,
        "tgi_batch_current_max_tokens": 0, "tgi_batch_total_tokens": 0, "tgi_batch_concat": 0,
        "tgi_batch_concat_duration_count": 0, "tgi_batch_forward_duration_count{method=decode}": 7,
        "tgi_batch_filter_duration_count{method=decode}": 7, "tgi_batch_inference_success{method=prefill}": 2,
        "tgi_batch_inference_success{method=decode}": 7, "tgi_batch_inference_failure{method=decode}": 0,
    }.items():  # fmt: skip
        assert totals[name] == value, name
    assert totals["tgi_batch_max_total_tokens"] > 0 and "tgi_batch_decode_duration_count{method=decode}" in totals
    if promtool := shutil.which("promtool"):
        checked = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True)
        # It also has opinions on names; those of vLLM and TGI are what they are.
        ours = [line for line in checked.stderr.splitlines() if not line.startswith(("vllm:", "tgi_"))]
        assert "error while linting" not in checked.stdout + checked.stderr and not ours, checked.stderr


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
