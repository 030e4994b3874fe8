"""Prompts on their way in: credits, pages, and the KV that fills them.

    RESERVED --bind--> BOUND --sealed--> READY --take--> (the engine's)
        any of them --end--> ended: credits and pages are back, the id and the cause are remembered for a while

A transfer lives as long as its Decode call, or until its lease ends if that call never comes. A promise also
ends where it is all that a prompt here waits for: two workers of both roles, each full of promises to prompts in
the other's queue, would wait for ever. Only `scatter` runs outside the event loop; its lock makes sure that no
page is given back while it is being written, and that nothing is written once the transfer has ended.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import structlog
import torch
from pagewire.v1 import common_pb2
from pagewire_core import faults
from pagewire_core.errors import Cancelled, InvalidRequest, Overloaded, PagewireError, Unavailable, from_proto
from pagewire_engine.engine import Engine
from pagewire_engine.sequence import Request
from pagewire_transfer.receiver import ReceiveStats

log = structlog.get_logger(__name__)

LEASE_S = 10.0
LOOK_S = 1.0  # between looks for a prompt that waits for promises alone; the second that finds one ends some
TOMBSTONE_S = 60.0
_MAX_TOMBSTONES = 100_000


@dataclass(eq=False)
class Transfer:
    """One prompt that a prefill worker computes for this worker."""

    transfer_id: bytes
    prompt: list[int]
    cache_root: bytes
    local_tokens: int
    credits: int
    n: int
    ready: asyncio.Future[tuple[ReceiveStats, Sequence[common_pb2.SampledToken]]]
    lease: asyncio.TimerHandle | None = None
    block_table: list[int] = field(default_factory=list)
    valid: bool = False  # pages are bound and may be written
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_for(self, request: Request) -> bool:
        """Whether the KV in its pages is that of the request's prompt, and may be known to its tenant."""
        return (self.prompt, self.cache_root, self.n) == (request.prompt, request.cache_root, request.n)


class Transfers:
    """KvSink over the engine. abort_peer tells the prefill side that a transfer is over."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._transfers: dict[bytes, Transfer] = {}
        self._tombstones: dict[bytes, tuple[float, common_pb2.Error]] = {}  # until when, and why it ended
        self._look: asyncio.TimerHandle | None = None
        self.abort_peer: Callable[[bytes, PagewireError], None] = lambda transfer_id, error: None

    def __len__(self) -> int:
        return len(self._transfers)

    def reserve(self, transfer_id: bytes, prompt: list[int], cache_root: bytes, n: int) -> Transfer:
        """Promises room for a prompt and its first step. Raises Overloaded, ContextLength, and what ended it before.

        One that is refused is asked for again by another id: it is known by the prompt. n: 0 for one that is not.
        """
        self._check_not_ended(transfer_id)
        if transfer_id in self._transfers:
            return self._transfers[transfer_id]
        config = self._engine.config
        self._engine.check_fits(len(prompt), n)
        local_tokens = self._engine.external.pin_prefix(transfer_id, prompt, cache_root)
        # Every choice may soon need a block of its own: for its next token, or a copy of the shared last one.
        pinned = local_tokens // config.block_size
        credits = min(config.blocks_for(len(prompt)) + n, config.num_blocks) - pinned
        try:
            self._engine.external.reserve(credits, _claimant(prompt, cache_root, n) if n else None)
        except PagewireError:
            self._engine.external.free(transfer_id)
            raise
        loop = asyncio.get_running_loop()
        transfer = Transfer(transfer_id, prompt, cache_root, local_tokens, credits, n, loop.create_future())
        transfer.lease = loop.call_later(LEASE_S, self.end, transfer_id, Cancelled("the reservation's lease ended"))
        self._transfers[transfer_id] = transfer
        if self._look is None:
            self._look_later(found=False)
        return transfer

    def renounce(self, request: Request) -> None:
        """Its prompt is computed here: it must not wait for what it has claimed for a transfer."""
        self._engine.external.renounce(_claimant(request.prompt, request.cache_root, request.n))

    def claim(self, transfer_id: bytes) -> Transfer:
        """The reserved transfer, which now lives as long as the caller wants it."""
        self._check_not_ended(transfer_id)
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            raise Unavailable("this transfer has no reservation here; its lease may have ended")
        if transfer.lease is None:
            raise InvalidRequest("this transfer already has its Decode call")
        transfer.lease.cancel()
        transfer.lease = None
        return transfer

    def take(self, transfer: Transfer) -> list[int]:
        """The block table of a ready transfer; its references pass to the caller.

        Raises Cancelled if it was ended after it was ready, before its caller had a turn.
        """
        if self._transfers.pop(transfer.transfer_id, None) is None:
            raise Cancelled("the transfer has ended")
        return self._engine.external.unbind(transfer.transfer_id)

    def end(self, transfer_id: bytes, error: PagewireError) -> bool:
        """Gives back whatever the transfer holds; who comes late is told the first cause. Idempotent."""
        self._bury(transfer_id, error)
        transfer = self._transfers.pop(transfer_id, None)
        if transfer is None:
            return False
        if transfer.lease:
            transfer.lease.cancel()
        self.abort_peer(transfer_id, error)
        with transfer.lock:  # waits for a scatter that is under way
            transfer.valid = False
        self._engine.external.free(transfer_id)
        self._engine.external.unreserve(transfer.credits)
        if not transfer.ready.done():
            transfer.ready.set_exception(error)
            transfer.ready.exception()  # nobody may be waiting
        return True

    def end_all(self, error: PagewireError) -> None:
        for transfer_id in list(self._transfers):
            self.end(transfer_id, error)

    def _look_later(self, found: bool) -> None:
        wait_s = LOOK_S * random.uniform(1, 2)  # of two workers that wait for each other one is the first
        self._look = asyncio.get_running_loop().call_later(wait_s, self._relieve, found)

    def _relieve(self, found_before: bool) -> None:
        """Ends the latest promises if a prompt here waits for them alone, and did so when it was last looked."""
        transfers = list(self._transfers.values())
        coming = any(transfer.valid for transfer in transfers)
        lacking = 0 if coming else self._engine.blocks_promised_away()
        if lacking and found_before:
            for transfer in reversed([transfer for transfer in transfers if transfer.lease is None]):
                if lacking > 0:
                    lacking -= transfer.credits
                    self.end(transfer.transfer_id, Overloaded("the room promised for the prompt was needed here"))
        self._look = None
        if self._transfers:
            self._look_later(found=lacking > 0)

    def _check_not_ended(self, transfer_id: bytes) -> None:
        until, cause = self._tombstones.get(transfer_id, (0.0, common_pb2.Error()))
        if until > time.monotonic():
            raise from_proto(cause)

    def _bury(self, transfer_id: bytes, error: PagewireError) -> None:
        now = time.monotonic()
        while self._tombstones and next(iter(self._tombstones.values()))[0] < now:
            del self._tombstones[next(iter(self._tombstones))]
        if len(self._tombstones) >= _MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        self._tombstones.setdefault(transfer_id, (now + TOMBSTONE_S, error.to_proto()))

    # ---------------------------------------------------------------- KvSink

    async def bind(self, transfer_id: bytes, token_begin: int, token_end: int) -> None:
        """Turns credits into pages. Raises Overloaded if they were oversold."""
        self._check_not_ended(transfer_id)
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            raise Unavailable("this transfer has no reservation here; its lease may have ended")
        if (token_begin, token_end) != (transfer.local_tokens, len(transfer.prompt)):
            raise InvalidRequest(
                f"tokens [{token_begin}, {token_end}) were offered, "
                f"[{transfer.local_tokens}, {len(transfer.prompt)}) are missing"
            )
        if transfer.valid:
            raise InvalidRequest("this transfer has its pages, and may have its KV")
        faults.point("bind")
        transfer.block_table = self._engine.external.bind(transfer_id, len(transfer.prompt))
        self._engine.external.unreserve(transfer.credits)
        transfer.credits = 0
        transfer.valid = True

    def scatter(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            raise Cancelled("the transfer has ended")
        with transfer.lock:
            if not transfer.valid:
                raise Cancelled("the transfer has ended or has no pages yet")
            return self._engine.runner.cache.scatter_checked(wire, transfer.block_table, layers, tokens)

    async def sealed(
        self, transfer_id: bytes, received: ReceiveStats, first_tokens: Sequence[common_pb2.SampledToken]
    ) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or not transfer.valid or transfer.ready.done():
            raise Cancelled("the transfer has ended or was never begun")
        if len(first_tokens) != transfer.n:
            raise InvalidRequest(f"{len(first_tokens)} first tokens came for {transfer.n} choices")
        self._engine.check_ids([t.token_id for t in first_tokens])
        transfer.ready.set_result((received, first_tokens))

    def failed(self, transfer_id: bytes, error: PagewireError) -> None:
        log.warning("transfer failed", transfer_id=transfer_id.hex(), error=error.message)
        self.end(transfer_id, error)


def _claimant(prompt: Sequence[int], cache_root: bytes, n: int) -> Hashable:
    return hash((cache_root, n, tuple(prompt)))
