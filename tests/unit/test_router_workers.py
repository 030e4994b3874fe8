"""Who the router knows: workers that join, leave, come back, or are not fit to join."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import FakeWorker, RedisServer, Script, make_model, write_byte_tokenizer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pagewire.v1 import inference_pb2, worker_pb2
from pagewire_core import prefix_index
from pagewire_core.block_events import BlockEventPublisher
from pagewire_core.block_hash import block_hashes, chain_root
from pagewire_core.prefix_index import Snapshot
from pagewire_core.registry import Registration
from pagewire_core.rpc import PROTOCOL, open_channel
from pagewire_core.tokenizer import Tokenizer
from pagewire_router import ledger, workers
from pagewire_router.main import _report_health
from prometheus_client.parser import text_string_to_metric_families
from router_scene import EOS, ROLES, Scene, scene, until
from structlog.testing import capture_logs


@contextlib.asynccontextmanager
async def one_more(s: Scene, name: str, address: str = "") -> AsyncIterator[FakeWorker]:
    """A worker that nobody told the router of."""
    peers = next(iter(s.workers.values())).peers if s.workers else {}
    worker = FakeWorker(name, ROLES[name[0]], Script([*s.ids("hello world"), EOS]), peers)
    worker.address = address
    yield worker
    await worker.kill()


@contextlib.asynccontextmanager
async def registered(server: RedisServer, worker: FakeWorker) -> AsyncIterator[None]:
    fields = {"worker_id": worker.worker_id, "instance": worker.instance, "address": worker.address, "role": "x"}
    registration = Registration(server.url, fields)
    task = asyncio.create_task(registration.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await registration.deregister()


def live(s: Scene) -> list[str]:
    return sorted(w.worker_id for w in s.router.services.workers.live)


async def test_a_registered_worker_joins_serves_and_leaves_while_the_router_runs(
    byte_tokenizer: Tokenizer, redis_server: RedisServer
) -> None:
    async with scene(byte_tokenizer, "p1", redis_url=redis_server.url) as s, one_more(s, "d1") as d1:
        await d1.start()
        async with registered(redis_server, d1):
            await until(lambda: live(s) == ["d1", "p1"])
            assert (await s.ask()).text == {0: "hello world"}
            redis_server.kill()
            await until(lambda: not s.router.redis_connected)
            assert (await s.ask()).text == {0: "hello world"}
            assert live(s) == ["d1", "p1"]
            redis_server.start()
            await until(lambda: s.router.redis_connected)
            await d1.kill()
            await until(lambda: live(s) == ["p1"])


async def test_a_worker_that_comes_back_on_its_address_is_a_new_one(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        d1 = s.workers["d1"]
        d1.hashes = [bytes(16)]
        await d1.kill()
        await until(lambda: live(s) == ["p1"])
        async with one_more(s, "d1", d1.address) as again:
            again.instance = "d1-2"
            await again.start()
            await until(lambda: live(s) == ["d1", "p1"])
            assert s.router.index.instance_of("d1") == "d1-2"
            assert (await s.ask()).text == {0: "hello world"}
            assert "decode" in again.seen


async def test_a_worker_that_registers_again_is_not_left_to_the_back_off(
    byte_tokenizer: Tokenizer, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has long been away, the next attempt of its own accord would come too late for whoever waits."""
    async with scene(byte_tokenizer, "p1 d1", redis_url=redis_server.url) as s:
        d1 = s.workers["d1"]
        monkeypatch.setattr(workers, "_MIN_BACKOFF_S", 600.0)
        monkeypatch.setattr(workers, "_MAX_BACKOFF_S", 600.0)
        await d1.kill()
        await until(lambda: live(s) == ["p1"])
        async with one_more(s, "d1", d1.address) as again:
            again.instance = "d1-2"
            await again.start()
            async with registered(redis_server, again):
                await until(lambda: live(s) == ["d1", "p1"])


async def test_a_worker_that_joins_while_another_change_is_told_makes_the_router_serving(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks again by himself here: a change that goes unseen is never told."""
    told: list[bool] = []

    async def until_changed(self: workers.WorkerTable, timeout_s: float) -> None:
        await self._changed.wait()

    class Server:
        async def set_serving(self, serving: bool) -> None:
            told.append(serving)
            await asyncio.sleep(0.05)

    class Table(workers.WorkerTable):
        usable = False

    class Queue:
        def wake(self) -> None: ...

    monkeypatch.setattr(workers.WorkerTable, "wait_changed", until_changed)
    table = Table(b"")
    task = asyncio.create_task(_report_health(Server(), table, Queue()))  # type: ignore[arg-type]
    await until(lambda: told == [False])
    table.usable = True
    table._notify()  # while that is being told
    await until(lambda: told == [False, True])
    table._notify()
    await asyncio.sleep(0)  # it has seen that one, and gathers what else there may be
    table.usable = False
    table._notify()
    await until(lambda: told == [False, True, False])
    task.cancel()


@pytest.mark.parametrize(("field", "value"), [("digest", b"x" * 32), ("protocol", PROTOCOL + 2)])
async def test_a_worker_with_other_weights_or_another_protocol_never_joins(
    byte_tokenizer: Tokenizer, redis_server: RedisServer, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    async with scene(byte_tokenizer, "p1", redis_url=redis_server.url) as s, one_more(s, "d1") as d1:
        setattr(d1, field, value)
        await d1.start()
        told = ""

        def refused() -> bool:
            nonlocal told
            told += capsys.readouterr().out
            return "worker refused" in told

        async with registered(redis_server, d1):
            await until(refused)
            await asyncio.sleep(1.0)  # for it to be said again
            assert live(s) == ["p1"]
        assert (told + capsys.readouterr().out).count("worker refused") == 1


@pytest.mark.parametrize("protocol", [PROTOCOL - 1, PROTOCOL + 1])
async def test_a_worker_of_the_version_before_or_after_joins(
    byte_tokenizer: Tokenizer, redis_server: RedisServer, protocol: int
) -> None:
    async with scene(byte_tokenizer, "p1", redis_url=redis_server.url) as s, one_more(s, "d1") as d1:
        d1.protocol = protocol
        await d1.start()
        async with registered(redis_server, d1):
            await until(lambda: live(s) == ["d1", "p1"])
            assert (await s.ask()).text == {0: "hello world"}


async def test_two_processes_with_one_worker_id_are_one_worker(
    byte_tokenizer: Tokenizer, redis_server: RedisServer
) -> None:
    async with scene(byte_tokenizer, "p1 d1", redis_url=redis_server.url) as s, one_more(s, "d1") as double:
        double.instance = "another"
        await double.start()
        async with registered(redis_server, double):
            await asyncio.sleep(0.8)
            assert live(s) == ["d1", "p1"]
            assert s.router.index.instance_of("d1") == "d1-1"


@pytest.mark.parametrize("others", [0, 1], ids=["one process by two addresses", "two processes of one id"])
async def test_who_is_introduced_twice_at_one_moment_joins_once(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """Each report of either made it the one that had just joined, and all that was known of the other was forgotten."""
    stats, num_followed = FakeWorker.Stats, 0

    async def when_both_are_followed(
        self: FakeWorker, request: Any, context: Any
    ) -> AsyncIterator[worker_pb2.StatsResponse]:
        nonlocal num_followed
        num_followed += self.worker_id == "d1"
        while self.worker_id == "d1" and num_followed < 2:
            await asyncio.sleep(0.01)
        async for response in stats(self, request, context):
            yield response

    monkeypatch.setattr(FakeWorker, "Stats", when_both_are_followed)
    async with scene(byte_tokenizer, "p1") as s, one_more(s, "d1") as d1, one_more(s, "d1") as double:
        double.instance = "another"
        await d1.start()
        await double.start()
        table = s.router.services.workers
        joined, reports = [], 0

        def reported(worker: workers.Worker) -> None:
            nonlocal reports
            reports += worker.worker_id == "d1"

        monkeypatch.setattr(table, "_joined", joined.append)
        monkeypatch.setattr(table, "_reported", reported)
        other = double.address if others else d1.address.replace("127.0.0.1", "localhost")
        table.set_static([s.workers["p1"].address, d1.address, other])
        await until(lambda: reports == 6)
        assert joined == [table.get("d1")]


async def test_a_worker_that_never_answers_is_told_of_once_and_one_that_is_starting_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with an address that cannot be reached from the router, or where one of the two speaks no TLS."""
    attempts: list[object] = []
    monkeypatch.setattr(workers, "_MAX_BACKOFF_S", 0.1)
    monkeypatch.setattr(workers, "open_channel", lambda *args: attempts.append(args) or open_channel(*args))
    table = workers.WorkerTable(b"")
    with capture_logs() as lines:
        table.set_static(["127.0.0.1:1"])
        await until(lambda: len(attempts) > 2)
        assert not lines
        monkeypatch.setattr(workers, "_DEAD_S", 0.0)
        await until(lambda: bool(lines))
        told = len(attempts)
        await until(lambda: len(attempts) > told + 2)
    await table.close()
    [line] = lines
    assert (line["event"], line["address"], line["log_level"]) == ("worker refused", "127.0.0.1:1", "error")
    assert line["reason"].startswith("does not answer: ")


async def test_a_worker_that_falls_silent_gets_nothing_new_and_then_counts_as_dead(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection may still answer, as that of a process whose loop a driver holds up does."""
    monkeypatch.setattr(ledger, "_SUSPECT_S", 0.5)
    monkeypatch.setattr(workers, "_DEAD_S", 1.5)
    async with scene(byte_tokenizer, "p1 d1 d2") as s:
        d1, d2 = s.workers["d1"], s.workers["d2"]
        for worker in (d1, d2):
            worker.script.hooks["decode"] = lambda w: asyncio.sleep(60) if w.silent else None
        asking = [asyncio.create_task(s.ask()) for _ in range(6)]
        d1.silent = True
        await until(lambda: not s.router.services.workers.get("d1").suspect)
        await until(lambda: s.router.services.workers.get("d1").suspect)
        taken = len(d1.requests)
        assert taken > 0
        for _ in range(5):
            assert (await s.ask()).text == {0: "hello world"}
        assert len(d1.requests) == taken
        for answer in await asyncio.gather(*asking):
            assert answer.text == {0: "hello world"}
        assert live(s) == ["d2", "p1"]
        d1.silent = False
        await until(lambda: live(s) == ["d1", "d2", "p1"])
        await s.settle()


async def test_a_worker_that_dies_while_it_is_asked_for_its_blocks_does_not_end_the_index(
    byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing its channel cancelled whoever read from it: from then on nobody asked any worker again."""
    monkeypatch.setattr(workers, "_DEAD_S", 0.5)
    monkeypatch.setattr(workers, "_SNAPSHOT_TIMEOUT_S", 1.5)
    monkeypatch.setattr(prefix_index, "_REFRESH_S", 0.05)
    snapshot, asked = FakeWorker.Snapshot, 0

    async def stand_still(self: FakeWorker, request: Any, context: Any) -> AsyncIterator[worker_pb2.SnapshotResponse]:
        nonlocal asked
        if self.worker_id == "d1":
            asked += 1
            await asyncio.sleep(60)
        async for response in snapshot(self, request, context):
            yield response

    monkeypatch.setattr(FakeWorker, "Snapshot", stand_still)
    async with scene(byte_tokenizer, "p1 d1") as s:
        await until(lambda: asked == 2)  # when it joined, and by who asks all workers in turn
        s.workers["d1"].silent = True
        await until(lambda: live(s) == ["p1"])
        s.workers["p1"].hashes = [bytes(16)]
        await until(lambda: s.router.index.num_blocks == 1)


async def test_without_a_decode_worker_the_router_is_not_serving(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        models = await s.stub.ListModels(inference_pb2.ListModelsRequest())
        assert models.models[0].ready
        await s.workers["d1"].kill()
        await until(lambda: not s.router.services.workers.usable)
        models = await s.stub.ListModels(inference_pb2.ListModelsRequest())
        assert not models.models[0].ready


async def test_a_request_goes_where_its_prefix_is(byte_tokenizer: Tokenizer, redis_server: RedisServer) -> None:
    async with scene(byte_tokenizer, "p1 p2 d1", redis_url=redis_server.url) as s:
        prompt = "x" * 200
        hashes = block_hashes(chain_root(b"f" * 32), s.ids(prompt))
        publisher = BlockEventPublisher(redis_server.url, b"f" * 32, "p2", "p2-1", lambda: hashes)
        task = asyncio.create_task(publisher.run())
        publisher.stored(hashes)
        await until(lambda: s.router.index.match(hashes) == {"p2": 3})
        for _ in range(4):
            summary = (await s.ask(prompt)).summary
            assert summary is not None
            assert summary.prefill_worker == "p2"
        salted = [(await s.ask(prompt, cache_salt=f"{i}")).summary for i in range(40)]  # each by chance
        assert {x.prefill_worker for x in salted if x is not None} == {"p1", "p2"}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_status_and_metrics_tell_of_the_router_and_its_workers(
    byte_tokenizer: Tokenizer, redis_server: RedisServer
) -> None:
    async with scene(byte_tokenizer, "p1 d1", redis_url=redis_server.url) as s:
        await s.ask()
        await s.settle()
        await until(lambda: s.router.redis_connected)
        status = await s.stub.Status(inference_pb2.StatusRequest())
        assert sorted(w.worker_id for w in status.workers) == ["d1", "p1"]
        assert all(w.ready and w.total_blocks == 64 for w in status.workers)
        assert (status.queued_requests, status.running_requests, status.redis_connected) == (0, 0, True)
        text = (await s.stub.Metrics(inference_pb2.MetricsRequest())).text
        families = {f.name: f for f in text_string_to_metric_families(text)}
        assert {x.labels["instance"] for x in families["pagewire_fake"].samples} == {"p1", "d1"}
        assert families["pagewire_redis_connected"].samples[0].value == 1


async def test_what_the_index_promised_is_held_against_what_was_found(byte_tokenizer: Tokenizer) -> None:
    async with scene(byte_tokenizer, "p1 d1") as s:
        text, worker = "x" * 200, s.workers["p1"]
        root = chain_root(b"f" * 32)
        hashes = block_hashes(root, s.ids(text))
        found: list[tuple[float, float, float]] = []
        await until(lambda: not s.router.follower._tasks)  # the workers' own snapshots, which are empty, have come
        # Three blocks of 64 tokens are promised: all are found, one is, none was promised and two are found.
        for promised, cached in ((3, 192), (3, 64 + 20), (0, 130)):
            s.router.index.load("p1", "p1-1", Snapshot(0, hashes[:promised]))
            worker.script.cached_tokens = cached
            await s.ask(text)
            metrics = s.router.services.metrics
            counters = (metrics.expected_hits, metrics.false_hits, metrics.unexpected_hits)
            found.append(tuple(c._value.get() for c in counters))  # type: ignore[arg-type]
        assert found == [(192, 0, 0), (384, 128, 0), (384, 128, 128)]


async def test_every_metric_keeps_its_name(byte_tokenizer: Tokenizer) -> None:
    """Without a Redis, which is then not said to be away: pagewire_redis_connected."""
    async with scene(byte_tokenizer, "p1 d1") as s:
        text = (await s.stub.Metrics(inference_pb2.MetricsRequest())).text
        names = {f.name for f in text_string_to_metric_families(text) if not f.name.endswith("_created")}
        assert names == {
            "pagewire_fake", "pagewire_requests", "pagewire_router_queue_seconds",
            "pagewire_time_to_first_token_seconds", "pagewire_inter_token_latency_seconds", "pagewire_e2e_seconds",
            "pagewire_prompt_tokens", "pagewire_generation_tokens", "pagewire_cached_tokens", "pagewire_route",
            "pagewire_retries", "pagewire_resumed_requests", "pagewire_running_requests", "pagewire_queued_requests",
            "pagewire_queued_prompt_tokens",
            "pagewire_index_age_seconds", "pagewire_index_level", "pagewire_index_gaps",
            "pagewire_expected_hit_tokens", "pagewire_false_hit_tokens", "pagewire_unexpected_hit_tokens",
            "pagewire_index_blocks", "pagewire_predicted_seconds", "pagewire_prediction_error_seconds",
            "pagewire_circuits_opened", "pagewire_circuits_open",
            "pagewire_inference_seconds", "pagewire_mean_time_per_token_seconds",
            "pagewire_request_prompt_tokens", "pagewire_request_generation_tokens", "pagewire_request_max_tokens",
            "pagewire_request_choices", "pagewire_finished_choices", "pagewire_request_longest_answer_tokens",
            "pagewire_validation_seconds", "pagewire_step_text_seconds",
        }  # fmt: skip


def start_router(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pagewire_router.main", "--log-format=json", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no model"),
        (["--model=/nowhere", "--workers=127.0.0.1:1"], "no directory /nowhere"),
        (["--model=/nowhere"], "no workers to know of"),
        (["--model={model}", "--redis-url=http://x"], "is not a URL"),
        (["--model={model}", "--workers=127.0.0.1:1", "--chat-template=/none"], "cannot be read"),
    ],
)
def test_a_router_that_cannot_start_says_why_in_one_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    write_byte_tokenizer(make_model(tmp_path / "m"))
    router = start_router(*(a.format(model=tmp_path / "m") for a in arguments))
    _, told = router.communicate(timeout=60)
    assert router.returncode == 1
    assert sentence in told
    assert len(told.splitlines()) == 1


async def test_the_process_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    write_byte_tokenizer(make_model(tmp_path / "m"))
    router = start_router(f"--model={tmp_path / 'm'}", "--workers=127.0.0.1:1", "--served-model-name=a,b")
    assert router.stderr is not None
    line = await asyncio.to_thread(router.stderr.readline)
    assert "router ready" in line
    address = line.split('"address": "')[1].split('"')[0]
    async with open_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=5)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    router.send_signal(signal.SIGTERM)
    _, rest = await asyncio.to_thread(router.communicate, timeout=60)
    assert router.returncode == 0, rest
    assert "Traceback" not in rest
