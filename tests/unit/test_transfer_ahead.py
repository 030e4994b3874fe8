"""Layers that are sent ahead of their step's end, under every order of events: nothing before it is final.

What decoding starts on is what was computed, cell by cell.

The two real state machines with a control stream each way and a lane between them that keep their order and nothing
else; hypothesis decides who moves next. No sockets, no threads, no clock. (test_transfer_interleavings.py has the same
ends with tokens alone.)
"""

from __future__ import annotations

import asyncio
from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire.v1 import common_pb2 as pb
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Cancelled, PagewireError, from_proto
from pagewire_transfer.chunking import ChunkPlan
from pagewire_transfer.incoming import Incoming
from pagewire_transfer.outgoing import Outgoing
from pagewire_transfer.wire import ChunkRange, chunk_bytes, token_bytes

LAYOUT = kv.KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, dtype="float32")
TOKENS = (2, 11)
ID = b"i" * 16
WINDOW = 3
FIRST = [pb.SampledToken(token_id=9)]


def content(part: ChunkRange) -> np.ndarray:
    """What the KV of these layers and tokens is."""
    layers, tokens = np.meshgrid(range(*part.layers), range(*part.tokens), indexing="ij")
    return layers * 1000 + tokens + 1


class World:
    """A prefill side, a decode side, and what is between them. `final` is what has been computed."""

    lane_name = "test"

    def __init__(self) -> None:
        plan = ChunkPlan(LAYOUT, TOKENS, 4 * token_bytes(LAYOUT), 2 * token_bytes(LAYOUT))
        self.outgoing = Outgoing(self, ID, plan, timeout_s=3600)
        self.incoming: Incoming | None = Incoming(LAYOUT, TOKENS, WINDOW)
        self.to_decode: deque[kv.ConnectRequest] = deque()
        self.to_prefill: deque[kv.ConnectResponse] = deque()
        self.lane: deque[tuple[ChunkRange, np.ndarray]] = deque()
        self.landing: deque[kv.Chunk] = deque()  # announced, bytes not yet taken off the lane
        self.pages = np.zeros((LAYOUT.num_layers, TOKENS[1]), int)
        self.final = np.zeros_like(self.pages, bool)
        self.ready = False  # decoding may start
        self.damages = 0
        self.sends: dict[int, int] = {}
        self.ends: list[str] = []
        self.outgoing.grant(WINDOW)

    # ------------------------------------------------ what an Outgoing needs of its pair

    def post(self, request: kv.ConnectRequest) -> None:
        self.to_decode.append(request)

    def wake(self) -> None:
        pass

    def ended(self, outgoing: Outgoing) -> None:
        self.ends.append("prefill")

    def fail(self, error: PagewireError) -> None:
        raise AssertionError(f"nothing here breaks a pair: {error}")

    # ------------------------------------------------ moves; each is possible or does nothing

    def compute(self, num_tokens: int, layers: int) -> None:
        """Some layers of the next tokens are computed, or all of them."""
        begin = int(self.final.all(0).cumprod().sum())
        end = min(begin + num_tokens, TOKENS[1])
        if layers < LAYOUT.num_layers:
            self.final[:layers, begin:end] = True
            self.outgoing.extend(max(begin, 0), (end, layers))
        else:
            self.final[:, :end] = True
            self.outgoing.extend(end)

    def send(self, damaged: bool) -> None:
        """The lane thread: a chunk is gathered, goes onto the lane and is announced."""
        chosen = self.outgoing.next_chunk()
        if chosen is None:
            return
        seq, part = chosen
        assert self.outgoing.error is None and not self.ends, "a chunk of a transfer that has ended"
        assert self.final[slice(*part.layers), slice(*part.tokens)].all(), "KV was sent before it was final"
        self.sends[seq] = self.sends.get(seq, 0) + 1
        assert self.sends[seq] <= 2, "a chunk is sent again once"
        wire = content(part)
        checksum = hash(wire.tobytes()) & (1 << 64) - 1
        if damaged:
            self.damages += 1
            wire = wire + 5000
        self.lane.append((part, wire))
        self.outgoing.announced(seq, chunk_bytes(LAYOUT, part), checksum)
        self.post(kv.ConnectRequest(chunk=kv.Chunk(
            transfer_id=ID, seq=seq, layer_begin=part.layers[0], layer_end=part.layers[1], token_begin=part.tokens[0],
            token_end=part.tokens[1], num_bytes=chunk_bytes(LAYOUT, part), checksum=checksum,
        )))  # fmt: skip

    def hear_decode(self) -> None:
        """The decode side takes one message from the control stream."""
        if not self.to_decode:
            return
        request = self.to_decode.popleft()
        kind = request.WhichOneof("message")
        try:
            if kind == "chunk":
                if self.incoming is not None:
                    self.incoming.announce(request.chunk)
                self.landing.append(request.chunk)
            elif kind == "abort":
                self.end_decode()
            elif kind == "sealed" and self.incoming is not None:
                self.incoming.seal(request.sealed.num_chunks, request.sealed.root_checksum)
                self.ready, self.incoming = True, None
                self.to_prefill.append(kv.ConnectResponse(sealed_ack=kv.SealedAck(transfer_id=ID)))
        except PagewireError as error:
            self.abort_decode(error)
            if kind == "chunk":
                self.landing.append(request.chunk)

    def land(self) -> None:
        """The decode side takes the oldest chunk off the lane, wanted or not."""
        if not self.landing:
            return
        chunk, (part, wire) = self.landing.popleft(), self.lane.popleft()
        assert (chunk.layer_begin, chunk.token_begin) == (part.layers[0], part.tokens[0]), "the lane lost its order"
        if self.incoming is None:
            return
        intact = hash(wire.tobytes()) & (1 << 64) - 1 == chunk.checksum
        try:
            if intact:
                self.pages[slice(*part.layers), slice(*part.tokens)] = wire
                self.incoming.verified(chunk.seq)
            else:
                self.incoming.damaged(chunk.seq)
        except PagewireError as error:
            self.abort_decode(error)
            return
        ack = kv.ChunkAck(transfer_id=ID, seq=chunk.seq, resend=not intact)
        self.to_prefill.append(kv.ConnectResponse(chunk_ack=ack))

    def hear_prefill(self) -> None:
        """The prefill side takes one message; what comes after its end is dropped, as its pair drops it."""
        if not self.to_prefill:
            return
        response = self.to_prefill.popleft()
        if "prefill" in self.ends:
            return
        kind = response.WhichOneof("message")
        if kind == "chunk_ack":
            self.outgoing.acknowledge(response.chunk_ack.seq, response.chunk_ack.resend)
        elif kind == "sealed_ack":
            self.outgoing.seal_acknowledged()
        else:
            self.outgoing.fail(from_proto(response.abort.error))

    def abort_decode(self, error: PagewireError) -> None:
        """A lease ended, the call was cancelled, the peer broke the rules."""
        if self.incoming is not None:
            self.to_prefill.append(kv.ConnectResponse(abort=kv.Abort(transfer_id=ID, error=error.to_proto())))
            self.end_decode()

    def end_decode(self) -> None:
        if self.incoming is not None:
            self.incoming = None
            self.pages[:] = 0  # given back

    def check(self) -> None:
        in_flight = len(self.outgoing._inflight)
        assert in_flight <= WINDOW and len(self.lane) <= WINDOW + 1
        assert self.ends in ([], ["prefill"]), "it ends once"
        if self.ready:
            whole = ChunkRange((0, LAYOUT.num_layers), TOKENS)
            assert np.array_equal(self.pages[:, TOKENS[0] :], content(whole)), "decoding would start on wrong KV"
            assert self.final.all()


MOVE = st.one_of(
    st.tuples(st.just("compute"), st.integers(1, 5), st.integers(1, 3)),
    st.tuples(st.just("send"), st.booleans(), st.just(0)),
    st.tuples(st.sampled_from(["hear_decode", "land", "hear_prefill"]), st.just(0), st.just(0)),
    st.tuples(st.sampled_from(["hear_decode", "land", "hear_prefill"]), st.just(0), st.just(0)),
    st.tuples(st.sampled_from(["seal", "abort_prefill", "abort_decode"]), st.just(0), st.just(0)),
)


@settings(max_examples=150)
@given(st.lists(MOVE, max_size=60))
def test_no_order_of_events_starts_decoding_on_wrong_kv_or_leaves_anything(moves: list[tuple[str, int, int]]) -> None:
    asyncio.run(_play(moves))


async def _play(moves: list[tuple[str, int, int]]) -> None:
    world = World()
    sealing: asyncio.Task[object] | None = None
    aborted = False
    for move, first, second in moves:
        if move == "compute":
            world.compute(first, second)
        elif move == "send":
            world.send(bool(first))
        elif move == "seal" and sealing is None:
            world.compute(99, LAYOUT.num_layers)
            sealing = asyncio.create_task(world.outgoing.seal(FIRST))
            await asyncio.sleep(0)
        elif move == "abort_prefill":
            aborted = True
            world.outgoing.abort(Cancelled("the client has gone"))
        elif move == "abort_decode":
            aborted = aborted or world.incoming is not None
            world.abort_decode(Cancelled("the lease has ended"))
        elif move in ("hear_decode", "land", "hear_prefill"):
            getattr(world, move)()
        world.check()
    # Whoever is left goes on to the end, without further damage.
    if sealing is None:
        world.compute(99, LAYOUT.num_layers)
        sealing = asyncio.create_task(world.outgoing.seal(FIRST))
    for _ in range(60):
        await asyncio.sleep(0)
        world.send(damaged=False)
        world.hear_decode()
        world.land()
        world.hear_prefill()
        world.check()
    assert world.ends == ["prefill"] and world.incoming is None, "one side waits for ever"
    assert not world.lane and not world.landing and not world.to_decode and not world.to_prefill
    [outcome] = await asyncio.gather(sealing, return_exceptions=True)
    sealed = not isinstance(outcome, BaseException)
    assert not sealed or world.ready, "the prefill side believes in KV that the decode side has not"
    assert sealed or world.ready or not world.pages.any(), "pages were kept"
    twice = [seq for seq, count in world.sends.items() if count == 2]
    assert len(twice) <= world.damages
    if not aborted and not world.damages:
        assert sealed and world.ready, "nothing went wrong"
    if world.damages == 1 and not aborted:
        assert sealed and world.ready and world.outgoing.stats().resent == 1
