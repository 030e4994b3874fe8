"""Both ends of one transfer, in every order in which their messages, cancels and time-outs may come.

The two state machines without sockets or threads: what one end says waits in a queue until the random order has the
other end hear it, so that acknowledgements, aborts and seals cross in every way.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_endpoints import FIRST, LAYOUT
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Cancelled, DeadlineExceeded, Incompatible, PagewireError, Unavailable, from_proto
from pagewire_transfer.chunking import ChunkPlan
from pagewire_transfer.incoming import Incoming
from pagewire_transfer.outgoing import Outgoing
from pagewire_transfer.wire import chunk_bytes

NUM_TOKENS, WINDOW, CHUNK_BYTES = 12, 2, 400
USUAL = ("compute", "send", "hear P", "hear D")
ONCE = ("seal", "P cancels", "D cancels", "time is up")
Step = tuple[str, int]


class Ends:
    """The sending end is its own Port. damage: how often chunks arrive damaged, by number.

    believed: the receiving end has all of it and says so.
    """

    lane_name = "none"

    def __init__(self, damage: dict[int, int]) -> None:
        self.damage = dict(damage)
        self.to_d: deque[kv.ConnectRequest] = deque()
        self.to_p: deque[kv.ConnectResponse] = deque()
        self.num_ended = 0
        plan = ChunkPlan(LAYOUT, (0, NUM_TOKENS), CHUNK_BYTES)
        self.outgoing = Outgoing(self, b"t" * 16, plan, timeout_s=60)
        self.incoming: Incoming | None = Incoming(LAYOUT, (0, NUM_TOKENS), WINDOW)
        self.outgoing.grant(WINDOW)
        self.verified: list[tuple[int, int]] = []
        self.believed = False
        self.num_final = 0
        self.sealing: asyncio.Task[object] | None = None

    # ---------------------------------------------------------------- Port

    def post(self, request: kv.ConnectRequest) -> None:
        assert not self.num_ended, "something was said of a transfer that has ended"
        self.to_d.append(request)

    def wake(self) -> None:
        pass

    def ended(self, outgoing: Outgoing) -> None:
        self.num_ended += 1

    def fail(self, error: PagewireError) -> None:
        self.outgoing.fail(error)

    # ---------------------------------------------------------------- what may happen

    def do(self, what: str, number: int) -> None:
        if what == "compute":
            self.num_final = min(self.num_final + number % 5, NUM_TOKENS)
            self.outgoing.extend(self.num_final)
        elif what == "send":
            self._send()
        elif what == "hear P" and self.to_d:
            self._hear_p(self.to_d.popleft())
        elif what == "hear D" and self.to_p:
            self._hear_d(self.to_p.popleft())
        elif what == "seal" and self.sealing is None:
            self.sealing = asyncio.create_task(self.outgoing.seal(FIRST))
        elif what == "P cancels":
            self.outgoing.abort(Cancelled("the prefill call ended"))
        elif what == "D cancels":
            self._end_d(Cancelled("the decode call ended"))
        elif what == "time is up":
            self.fail(DeadlineExceeded("the peer stood still"))

    def _send(self) -> None:
        taken = self.outgoing.next_chunk()
        if taken is None:
            return
        seq, part = taken
        checksum = 1000 + seq
        self.outgoing.announced(seq, chunk_bytes(LAYOUT, part), checksum)
        self.to_d.append(
            kv.ConnectRequest(
                chunk=kv.Chunk(
                    seq=seq, layer_begin=part.layers[0], layer_end=part.layers[1], token_begin=part.tokens[0],
                    token_end=part.tokens[1], num_bytes=chunk_bytes(LAYOUT, part), checksum=checksum,
                )
            )
        )  # fmt: skip

    def _hear_p(self, request: kv.ConnectRequest) -> None:
        """As ReceivingPair does."""
        if self.incoming is None:
            return
        kind = request.WhichOneof("message")
        try:
            if kind == "abort":
                self.incoming = None
            elif kind == "chunk":
                part, seq = self.incoming.announce(request.chunk), request.chunk.seq
                damaged = self.damage.get(seq, 0) > 0
                if damaged:
                    self.damage[seq] -= 1
                    self.incoming.damaged(seq)
                else:
                    self.incoming.verified(seq)
                    self.verified += [(layer, t) for layer in range(*part.layers) for t in range(*part.tokens)]
                self.to_p.append(kv.ConnectResponse(chunk_ack=kv.ChunkAck(seq=seq, resend=damaged)))
            else:
                self.incoming.seal(request.sealed.num_chunks, request.sealed.root_checksum)
                self.believed, self.incoming = True, None
                self.to_p.append(kv.ConnectResponse(sealed_ack=kv.SealedAck()))
        except Unavailable as error:  # damaged twice; the peer breaks no rule, so nothing else may be raised
            self._end_d(error)

    def _end_d(self, error: PagewireError) -> None:
        if self.incoming is not None:
            self.incoming = None
            self.to_p.append(kv.ConnectResponse(abort=kv.Abort(error=error.to_proto())))

    def _hear_d(self, response: kv.ConnectResponse) -> None:
        """As Pair does."""
        if self.num_ended:
            return
        kind = response.WhichOneof("message")
        if kind == "chunk_ack":
            self.outgoing.acknowledge(response.chunk_ack.seq, response.chunk_ack.resend)
        elif kind == "sealed_ack":
            self.outgoing.seal_acknowledged()
        else:
            self.outgoing.fail(from_proto(response.abort.error))


async def _run(steps: Sequence[Step], damage: dict[int, int], seed: int) -> None:
    ends = Ends(damage)
    for what, number in steps:
        ends.do(what, number)
        await asyncio.sleep(0)
    rng = random.Random(seed)
    ends.do("seal", 0)
    for _ in range(400):  # and then whatever is under way comes to its end
        ends.do(rng.choice(USUAL), rng.randrange(5))
        await asyncio.sleep(0)
    assert ends.sealing is not None
    [outcome] = await asyncio.gather(ends.sealing, return_exceptions=True)
    assert ends.num_ended == 1
    assert len(set(ends.verified)) == len(ends.verified), "a part came twice"
    if not isinstance(outcome, PagewireError):
        assert not isinstance(outcome, BaseException), outcome
        assert ends.believed
    if ends.believed:
        assert len(ends.verified) == NUM_TOKENS * LAYOUT.num_layers
    assert ends.believed or ends.incoming is None or ends.outgoing.error is not None
    undisturbed = not any(what in ONCE[1:] for what, _ in steps) and max(damage.values(), default=0) < 2
    assert ends.believed or not undisturbed
    await ends.outgoing.closed()


@given(
    st.lists(
        st.tuples(st.sampled_from(USUAL * 4 + ONCE), st.integers(0, 4)),
        max_size=40,
    ),
    st.dictionaries(st.integers(0, 13), st.integers(1, 2), max_size=3),
    st.integers(0, 5),
)
@settings(max_examples=150)
def test_a_transfer_ends_once_on_both_sides_and_is_believed_only_if_all_of_it_came(
    steps: list[Step], damage: dict[int, int], seed: int
) -> None:
    asyncio.run(_run(steps, damage, seed))


async def test_a_chunk_that_waits_to_be_sent_again_is_not_there_to_be_acknowledged() -> None:
    """The turn to send it again came all the same, and ended the pair as a bug of the prefill worker's would."""
    ends = Ends({})
    ends.do("compute", 4)
    ends.do("send", 0)
    ends.outgoing.acknowledge(0, resend=True)
    with pytest.raises(Incompatible, match="chunk 0, which is not on its way"):
        ends.outgoing.acknowledge(0, resend=False)
    assert ends.outgoing.next_chunk() is not None
    ends.outgoing.abort(Cancelled("over"))
