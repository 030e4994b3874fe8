"""Prefixes between workers: those that others have are fetched, and others may have ours.

The worker that asks opens a transfer as a decode worker does, with the same credits, pages, checksums and end, and has
the holder send into it. What arrived and was sealed is in the prefix cache as if it had been computed here. Whatever
goes wrong, the prompt is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import grpc
import structlog
import torch
from pagewire.v1 import common_pb2 as pb
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire.v1.kv_channel_pb2_grpc import KvChannelServiceStub
from pagewire_core import tracing
from pagewire_core.errors import Cancelled, PagewireError, Unavailable, from_rpc
from pagewire_core.rpc import open_channel
from pagewire_core.tls import WORKER, TlsFiles
from pagewire_decode.transfers import Transfers
from pagewire_engine.engine import Engine
from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.sender import KvSender, KvSource, Outgoing
from prometheus_client import CollectorRegistry, Counter

log = structlog.get_logger(__name__)


class PrefixFetcher:
    """A Fetch (see prefix_fetch.py). address: of this worker's KvChannelService."""

    def __init__(
        self,
        engine: Engine,
        transfers: Transfers,
        identity: WorkerIdentity,
        address: str,
        tls: TlsFiles | None,
        registry: CollectorRegistry,
    ) -> None:
        self._engine, self._transfers, self._identity, self._address = engine, transfers, identity, address
        self._tls = tls
        self._fetches = Counter(
            "pagewire_kv_fetches", "Prefixes asked of other workers, by how that ended", ["outcome"], registry=registry
        )
        for outcome in ("ok", "not needed", "given up", "failed"):
            self._fetches.labels(outcome)  # there from the start, so that the first one is an increase

    async def __call__(self, prompt: Sequence[int], cache_root: bytes, holder: pb.KvHolder) -> pb.Fetched:
        fetched = pb.Fetched()
        if not holder.tokens or not self._engine.config.enable_prefix_caching:  # without a cache nothing would keep it
            return fetched
        began = time.monotonic()
        asked: tracing.Attributes = {"pagewire.holder": holder.worker_id, "pagewire.fetch_tokens": holder.tokens}
        with contextlib.suppress(TimeoutError), tracing.current().child("fetch", asked, "client") as span:
            async with asyncio.timeout(holder.timeout_s):
                fetched = await self._fetch(list(prompt[: holder.tokens]), cache_root, holder, span)
        fetched.fetch_us = int((time.monotonic() - began) * 1e6)
        return fetched

    async def _fetch(self, prompt: list[int], cache_root: bytes, holder: pb.KvHolder, span: tracing.Span) -> pb.Fetched:
        owner = os.urandom(16)
        outcome = "given up"  # if it is cancelled: it took longer than computing does, or nobody waits any more
        try:
            transfer = self._transfers.reserve(owner, prompt, cache_root, 0)
            if transfer.local_tokens >= len(prompt):
                outcome = "not needed"
                return pb.Fetched()
            self._transfers.claim(owner)
            await self._ask(owner, prompt, cache_root, transfer.local_tokens, holder, span)
            received, _ = await transfer.ready
            self._engine.adopt(prompt, cache_root, self._transfers.take(transfer))
            outcome = "ok"
            return pb.Fetched(tokens=received.tokens, bytes=received.bytes, lane=received.lane)
        except PagewireError as error:
            outcome = "failed"
            span.fail(error)
            log.warning("prefix not fetched", holder=holder.worker_id, tokens=len(prompt), error=error.message)
            return pb.Fetched()
        finally:
            self._fetches.labels(outcome).inc()
            if outcome != "ok":
                self._transfers.end(owner, Cancelled("the fetch has ended"))

    async def _ask(
        self,
        owner: bytes,
        prompt: list[int],
        cache_root: bytes,
        local_tokens: int,
        holder: pb.KvHolder,
        span: tracing.Span,
    ) -> None:
        """Returns when the holder says that it has sent all of it."""
        request = kv.FetchRequest(
            transfer_id=owner, prompt_ids=prompt, cache_root=cache_root, token_begin=local_tokens,
            address=self._address, instance=self._identity.instance, expect_instance=holder.instance,
        )  # fmt: skip
        async with open_channel(holder.address, self._tls, WORKER) as channel:
            try:
                await KvChannelServiceStub(channel).Fetch(request, metadata=span.headers)
            except grpc.RpcError as error:
                raise from_rpc(error) from None


class PrefixLender:
    """Sends cached prefixes to workers that ask; a KvSource of these, and of `prompts` if there are any."""

    def __init__(self, engine: Engine, prompts: KvSource | None = None) -> None:
        self._engine, self._prompts = engine, prompts
        self._cleanups: set[asyncio.Task[None]] = set()

    def gather(self, transfer_id: bytes, layers: tuple[int, int], tokens: tuple[int, int], wire: torch.Tensor) -> int:
        if table := self._engine.external.table(transfer_id):
            return self._engine.runner.cache.gather_checked(table, layers, tokens, wire)
        if self._prompts:
            return self._prompts.gather(transfer_id, layers, tokens, wire)
        raise Cancelled("the prefix is no longer lent")

    async def lend(self, sender: KvSender, request: kv.FetchRequest) -> kv.FetchResponse:
        """Holds the prefix while it is being sent. Raises Unavailable if it is not there any more."""
        owner, end = request.transfer_id, len(request.prompt_ids)
        if len(owner) != 16 or request.token_begin > end:
            raise Unavailable("a fetch needs a transfer id of 16 bytes and a range of tokens")
        held = self._engine.external.pin_prefix(owner, request.prompt_ids, request.cache_root)
        opening: asyncio.Task[Outgoing] | None = None
        try:
            if held < end:
                raise Unavailable(f"{held} tokens of the prefix are here, not {end}")
            opening = asyncio.create_task(
                sender.open(owner, request.address, request.instance, (request.token_begin, end))
            )
            outgoing = await opening
            stats = await outgoing.seal([])
            return kv.FetchResponse(transferred_bytes=stats.bytes, lane=stats.lane)
        finally:
            self._spawn(self._give_back(owner, opening))

    async def _give_back(self, owner: bytes, opening: asyncio.Task[Outgoing] | None) -> None:
        """Blocks may be evicted again only when no lane thread can read them any more."""
        if opening is not None:
            opening.cancel()
            [outgoing] = await asyncio.gather(opening, return_exceptions=True)
            if isinstance(outgoing, Outgoing):
                outgoing.abort(Cancelled("the fetch was given up"))  # no effect on a sealed transfer
                await outgoing.closed()
        self._engine.external.free(owner)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
