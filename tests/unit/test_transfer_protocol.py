"""A decode worker believes nothing that a prefill worker says: every broken rule fails closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch
from kv_endpoints import FIRST, LAYOUT, ends, identity, new_id, random_kv
from liars import TID, TOKENS, Liar, a_chunk, liar, the_seal
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Incompatible, PagewireError
from pagewire_transfer.wire import MAX_CHUNK_BYTES, root_checksum

pytestmark = pytest.mark.usefixtures("frozen_heap")

Hears = Callable[[Liar, type[PagewireError], str], Awaitable[None]]


async def test_an_honest_peer_is_believed() -> None:
    async with ends("grpc", window=2) as both, liar(both) as peer:
        await peer.say(chunk=a_chunk())
        assert (await peer.hear()).chunk_ack == kv.ChunkAck(transfer_id=TID)
        await peer.say(sealed=the_seal())
        assert (await peer.hear()).WhichOneof("message") == "sealed_ack"
        assert torch.equal(both.sink.pages[TID], random_kv(LAYOUT, TOKENS))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer_end": 4}, "outside the offer"),
        ({"layer_begin": 3}, "outside the offer"),
        ({"token_end": TOKENS + 1}, "outside the offer"),
        ({"token_begin": TOKENS}, "outside the offer"),
        ({"token_end": 2}, "bytes, not"),
        ({"num_bytes": 128}, "bytes, not"),
        ({"seq": 1}, "where chunk 0 was due"),
    ],
)
async def test_a_chunk_that_is_not_of_the_offer_ends_the_pair(changes: dict[str, int], sentence: str) -> None:
    async with ends("grpc", window=2) as both, liar(both) as peer:
        chunk = a_chunk(**changes)
        chunk.data = bytes(chunk.num_bytes)
        await peer.say(chunk=chunk)
        await peer.ends_with(Incompatible, sentence)
        assert TID in both.sink.failures and TID not in both.sink.pages
        await both.assert_empty()


@pytest.mark.parametrize(("seq", "sentence"), [(0, "came where chunk 1 was due"), (1, "overlaps")])
async def test_the_same_chunk_twice_ends_the_pair(seq: int, sentence: str) -> None:
    """At once, whatever else it carries: bytes for both may never come, and who waits for them waits in vain."""
    async with ends("grpc", window=2) as both, liar(both) as peer:
        other = new_id()
        await peer.say(offer=kv.Offer(transfer_id=other, token_end=TOKENS))
        await peer.hear()
        await peer.say(chunk=a_chunk())
        await peer.hear()
        await peer.say(chunk=a_chunk(seq=seq))
        await peer.ends_with(Incompatible, sentence)
        assert {TID, other} <= set(both.sink.failures)
        await both.assert_empty()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"num_chunks": 2}, "but 1 came"), ({"root_checksum": 5}, "root checksum")],
)
async def test_a_seal_that_does_not_fit_its_chunks_fails_the_transfer(changes: dict[str, int], sentence: str) -> None:
    async with ends("grpc", window=2) as both, liar(both) as peer:
        await peer.say(chunk=a_chunk())
        await peer.hear()
        await peer.say(sealed=the_seal(**changes))
        await peer.hears_abort(Incompatible, sentence)
        assert TID in both.sink.failures and not both.sink.done
        await both.assert_empty()


async def test_a_seal_with_tokens_missing_fails_the_transfer() -> None:
    async with ends("grpc", window=2) as both, liar(both) as peer:
        await peer.say(sealed=kv.Sealed(transfer_id=TID, root_checksum=root_checksum([])))
        await peer.hears_abort(Incompatible, "12 cells of KV missing")
        assert TID in both.sink.failures and not both.sink.done


@pytest.mark.parametrize(
    ("message", "hears"), [({"chunk": a_chunk()}, Liar.ends_with), ({"sealed": the_seal()}, Liar.hears_abort)]
)
async def test_a_chunk_before_its_grant_ends_the_pair_and_a_seal_the_transfer(
    message: dict[str, object], hears: Hears
) -> None:
    async with ends("grpc", window=2) as both, liar(both, granted=False) as peer:
        both.sink.hold_bind = asyncio.Event()
        await peer.say(offer=kv.Offer(transfer_id=TID, token_end=TOKENS))
        await peer.say(**message)
        await hears(peer, Incompatible, "before its grant")
        both.sink.hold_bind.set()
        await both.assert_empty()


@pytest.mark.parametrize(
    "message", [{"chunk": a_chunk()}, {"sealed": the_seal()}, {"abort": kv.Abort(transfer_id=TID)}]
)
async def test_what_belongs_to_no_open_transfer_is_dropped(message: dict[str, object]) -> None:
    """Both sides may abort at once, so late messages are normal, and must reach nothing."""
    async with ends("grpc", window=2) as both, liar(both, granted=False) as peer:
        await peer.say(**message)
        await peer.say(offer=kv.Offer(transfer_id=new_id(), token_end=TOKENS))
        assert (await peer.hear()).WhichOneof("message") == "grant"
        assert not both.sink.done and not both.sink.failures and TID not in both.sink.pages


async def test_a_worker_cannot_touch_the_transfer_of_another_pair() -> None:
    """One that has a certificate of ours and knows the transfer's id: it is not bound to the pair that carries it."""
    async with ends("grpc", window=2) as both, liar(both, granted=False) as peer:
        prompt = random_kv(LAYOUT, TOKENS, seed=1)
        outgoing = await both.open(prompt)
        tid = outgoing.transfer_id
        await peer.say(offer=kv.Offer(transfer_id=tid, token_end=TOKENS))
        refused = (await peer.hear()).abort
        assert refused.transfer_id == tid and "another prefill worker" in refused.error.message
        await peer.say(chunk=a_chunk(transfer_id=tid))
        await peer.say(sealed=the_seal(transfer_id=tid))
        await peer.say(abort=kv.Abort(transfer_id=tid))
        await peer.say(offer=kv.Offer(transfer_id=TID, token_end=TOKENS))
        assert (await peer.hear()).grant.transfer_id == TID  # so all of it was read
        outgoing.extend(TOKENS)
        await outgoing.seal(FIRST)
        assert torch.equal(both.sink.pages[tid], prompt) and tid not in both.sink.failures


def out_of_turn() -> list[tuple[dict[str, object], str]]:
    another_hello = identity("liar").hello("decode-life-1", ["grpc"])
    return [
        ({"hello": another_hello}, "hello is out of turn"),
        ({}, "an empty message is out of turn"),
        ({"offer": kv.Offer(transfer_id=b"short", token_end=1)}, "bad transfer id"),
        ({"offer": kv.Offer(transfer_id=TID, token_begin=2, token_end=1)}, "bad transfer id or range"),
        ({"offer": kv.Offer(transfer_id=TID, token_end=1)}, "that is open"),
        ({"chunk": a_chunk(num_bytes=MAX_CHUNK_BYTES + 1)}, "the limit is"),
        ({"chunk": a_chunk(num_bytes=0)}, "the limit is"),
    ]


@pytest.mark.parametrize(("message", "sentence"), out_of_turn())
async def test_a_peer_that_breaks_the_rules_of_the_stream_loses_it(message: dict[str, object], sentence: str) -> None:
    async with ends("grpc", window=2) as both, liar(both) as peer:
        await peer.say(**message)
        await peer.ends_with(Incompatible, sentence)
        assert TID in both.sink.failures
        await both.assert_empty()


async def test_data_of_another_length_than_announced_ends_the_pair() -> None:
    async with ends("grpc", window=2) as both, liar(both) as peer:
        await peer.say(chunk=a_chunk(data=b"too short"))
        await peer.ends_with(PagewireError, "came with 9 bytes")
        assert TID in both.sink.failures


@pytest.mark.parametrize("first", [{"offer": kv.Offer(transfer_id=TID)}, {}])
async def test_the_first_message_must_be_hello(first: dict[str, object]) -> None:
    async with ends("grpc") as both, liar(both, hello=False) as peer:
        await peer.say(**first)
        await peer.ends_with(Incompatible, "must be Hello")


async def test_a_peer_that_says_nothing_is_let_go() -> None:
    async with ends("grpc", timeout_s=0.1) as both, liar(both, hello=False) as peer:
        await peer.ends_with(PagewireError, "no Hello came")


class Bug(RuntimeError):
    pass


def raise_bug(_: bytes) -> None:
    raise Bug


@pytest.mark.parametrize("where", ["bind", "gather", "scatter", "seal"])
async def test_a_bug_in_an_engine_fails_its_transfer_and_not_the_process(where: str) -> None:
    async with ends("gloo") as both:
        match where:
            case "bind":
                both.sink.refuse = Bug()
            case "gather":
                both.source.before = raise_bug
            case "scatter":
                both.sink.before = raise_bug
            case "seal":
                both.sink.refuse_seal = Bug()
        with pytest.raises(PagewireError, match="Bug"):
            await (await both.open(random_kv(LAYOUT, TOKENS))).seal(FIRST)
        assert not both.sink.done
        await both.assert_empty()
