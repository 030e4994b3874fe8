"""Peers that must not exchange KV, or cannot, are told why in one sentence."""

from __future__ import annotations

import socket

import pytest
from kv_endpoints import FIRST, LAYOUT, ends, identity, lane_threads, new_id, random_kv, until
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import DeadlineExceeded, Incompatible, Unavailable
from pagewire_core.rpc import PROTOCOL
from pagewire_transfer.identity import WorkerIdentity

pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.mark.parametrize(
    ("prefill", "instance", "sentence"),
    [
        (identity("prefill", fingerprint=b"x" * 32), "decode-life-1", f"fingerprint {'78' * 32}.*{'66' * 32}"),
        (
            identity("prefill", kv.KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16")),
            "decode-life-1",
            "3 layers x 2 heads x 8 bfloat16, but decode worker 'decode' has .* float32",
        ),
        (identity("prefill"), "decode-life-0", "instance decode-life-0, but .*'decode' has instance decode-life-1"),
    ],
)
async def test_another_model_layout_or_life_is_refused_in_one_sentence(
    prefill: WorkerIdentity, instance: str, sentence: str
) -> None:
    async with ends("grpc", prefill=prefill) as both:
        with pytest.raises(Incompatible, match=sentence):
            await both.sender.open(new_id(), both.address, instance, (0, 4))
        await both.assert_empty()
        await until(lambda: both.metric("pairs") == 0)


@pytest.mark.parametrize("protocol", [PROTOCOL - 2, PROTOCOL + 2, 99])
async def test_a_distant_protocol_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    hello = identity("prefill").hello("decode-life-1", ["grpc"])
    hello.protocol = protocol
    monkeypatch.setattr("pagewire_transfer.identity.WorkerIdentity.hello", lambda *_: hello)
    sentence = f"asks for protocol {protocol}, but decode worker 'decode' has protocol {PROTOCOL}"
    async with ends("grpc") as both:
        with pytest.raises(Incompatible, match=sentence):
            await both.open(random_kv(LAYOUT, 4))


@pytest.mark.parametrize("protocol", [PROTOCOL - 1, PROTOCOL + 1])
async def test_a_peer_of_the_version_before_or_after_gets_its_kv_across(
    monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    """Also if it offers lanes that nobody here has heard of."""
    hello = identity("prefill").hello("decode-life-1", ["a lane of the future", "grpc"])
    hello.protocol = protocol
    monkeypatch.setattr("pagewire_transfer.identity.WorkerIdentity.hello", lambda *_: hello)
    async with ends("grpc") as both:
        outgoing = await both.open(random_kv(LAYOUT, 4))
        outgoing.extend(4)
        assert (await outgoing.seal(FIRST)).bytes > 0
        await both.assert_empty()


async def test_no_lane_in_common_is_refused_in_one_sentence() -> None:
    async with ends("grpc") as both, ends("gloo") as other:
        with pytest.raises(Incompatible, match="has the lanes gloo, but decode worker 'decode' has grpc"):
            await other.sender.open(new_id(), both.address, both.instance, (0, 4))


async def test_nccl_on_one_gpu_is_refused_at_once_and_in_one_sentence() -> None:
    async with ends("nccl", gpu="GPU-1", timeout_s=30) as both:
        with pytest.raises(Incompatible, match=r"has the lanes nccl:GPU-1, but .* nccl for workers on different GPUs"):
            await both.open(random_kv(LAYOUT, 4))


async def test_a_peer_that_accepts_and_says_nothing_is_waited_for_no_longer_than_it_may_take() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with ends("grpc", timeout_s=0.3) as both:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.3 s"):
                await both.sender.open(new_id(), address, both.instance, (0, 4))
            await both.assert_empty()
            assert both.metric("pairs") == 0


async def test_a_lane_that_never_comes_up_fails_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode worker's address for Gloo may be unreachable though its gRPC port is not."""
    monkeypatch.setattr("pagewire_transfer.pair.PREFILL_RANK", 1)  # both wait for a rank 0 that never comes
    async with ends("gloo", timeout_s=1.0) as both:
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await both.open(random_kv(LAYOUT, 4))
        await until(lambda: both.metric("pairs") == 0 and not lane_threads())
        await both.assert_empty()
