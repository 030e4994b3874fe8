"""Embeddings: prompts that are computed for their last hidden state alone, on the workers that compute prompts.

A request's inputs go through the queue in parts, each about a turn of it, and one of them waits at a time: a request of
any size has room there, and its tenant gets as much of the queue as with prompts that are generated from.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Sequence

import grpc
from pagewire.v1 import inference_pb2, prefill_pb2
from pagewire_core.block_hash import chain_root
from pagewire_core.errors import (
    Cancelled,
    ContextLength,
    InvalidRequest,
    Overloaded,
    PagewireError,
    Unavailable,
    from_rpc,
)
from pagewire_core.rpc import request_metadata
from pagewire_core.tasks import all_of, is_cancelled

from pagewire_router.admission import Admission, Slot
from pagewire_router.fair_queue import QUANTUM
from pagewire_router.ledger import Booking
from pagewire_router.model import ServedModel
from pagewire_router.request import check_model
from pagewire_router.workers import Worker, WorkerTable

MAX_INPUTS = 2048
_MAX_ATTEMPTS = 3
_PAUSE_S = 0.5  # before the last attempt, as a generation has it; the first retry is at once


def inputs_of(request: inference_pb2.EmbedRequest, model: ServedModel, max_model_len: int) -> list[list[int]]:
    """Token ids of every input. Raises ModelNotFound, InvalidRequest, ContextLength."""
    check_model(request.model, model)
    if not 0 < len(request.inputs) <= MAX_INPUTS:
        raise InvalidRequest(f"there must be 1 to {MAX_INPUTS} inputs, not {len(request.inputs)}", param="input")
    return [_ids(request, i, model, max_model_len) for i in range(len(request.inputs))]


def _ids(request: inference_pb2.EmbedRequest, i: int, model: ServedModel, max_model_len: int) -> list[int]:
    one = request.inputs[i]
    if one.HasField("token_ids"):
        ids = list(one.token_ids.ids)
        if any(token >= model.vocab_size for token in ids):
            raise InvalidRequest(f"token ids must be below the vocabulary size, {model.vocab_size}", param="input")
    else:
        ids = model.tokenizer.encode(one.text, True)
    if not ids:
        raise InvalidRequest(f"input {i} is empty: it must have at least one token", param="input")
    kept = request.truncate_prompt_tokens or len(ids)
    kept = min(kept, max_model_len) if request.truncate_to_fit else kept
    if len(ids) > kept:
        ids = ids[-kept:] if request.keep_last_tokens else ids[:kept]
    if len(ids) > max_model_len:
        raise ContextLength(
            f"This model's maximum context length is {max_model_len} tokens. Input {i} has {len(ids)} tokens; "
            "shorten it.",
            param="input",
        )
    return ids


def parts_of(inputs: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """As many inputs at a time, in order, as a turn of the queue pays for, or one that is longer."""
    part: list[list[int]] = []
    tokens = 0
    for ids in inputs:
        if part and tokens + len(ids) > QUANTUM:
            yield part
            part, tokens = [], 0
        part.append(ids)
        tokens += len(ids)
    yield part


class Embedder:
    """Places prompts on the prefill worker with the least to do, each part of them in its turn of the queue."""

    def __init__(self, workers: WorkerTable, admission: Admission) -> None:
        self._workers, self._admission = workers, admission

    async def embed(
        self, inputs: Sequence[list[int]], request_id: str, tenant: str, deadline: float
    ) -> list[inference_pb2.Embedding]:
        """The vectors, in order; the first failure ends all. Raises PagewireError."""
        queueing = asyncio.Lock()
        parts = (self._part(part, queueing, request_id, tenant, deadline) for part in parts_of(inputs))
        return [vector for part in await all_of(parts) for vector in part]

    async def _part(
        self, inputs: list[list[int]], queueing: asyncio.Lock, request_id: str, tenant: str, deadline: float
    ) -> list[inference_pb2.Embedding]:
        slot = Slot(sum(map(len, inputs)), tenant, n=0, deadline=deadline)
        async with contextlib.AsyncExitStack() as held:
            async with queueing:
                await held.enter_async_context(self._admission.slot(slot))
            return await all_of(self._one(ids, request_id, tenant, deadline) for ids in inputs)

    async def _one(self, ids: list[int], request_id: str, tenant: str, deadline: float) -> inference_pb2.Embedding:
        failed: list[str] = []  # on whom, once for each attempt
        while True:
            worker = self._choose(failed)
            try:
                return await self._ask(worker, ids, request_id, tenant, deadline)
            except (Overloaded, Unavailable, Cancelled):  # cancelled: by a worker that stops and had not begun it
                failed.append(worker.worker_id)
                if len(failed) == _MAX_ATTEMPTS:
                    raise
            if len(failed) > 1:
                await asyncio.sleep(_PAUSE_S)

    def _choose(self, avoid: Sequence[str]) -> Worker:
        able = [w for w in self._workers.live if w.can_prefill and not w.suspect]
        if not able:
            raise Unavailable("no worker that computes prompts is ready", retry_after_s=1.0)
        fresh = [w for w in able if w.worker_id not in avoid] or able
        return min(fresh, key=lambda w: w.load(0).waiting_tokens)

    async def _ask(
        self, worker: Worker, ids: list[int], request_id: str, tenant: str, deadline: float
    ) -> inference_pb2.Embedding:
        message = prefill_pb2.EmbedPromptRequest(
            request_id=request_id,
            prompt_ids=ids,
            cache_root=chain_root(worker.info.fingerprint, tenant_salt=tenant.encode()),
        )
        timeout_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
        dead: PagewireError | None = None

        def die(error: PagewireError) -> None:
            nonlocal dead
            dead = error
            call.cancel()

        with worker.booked(Booking(compute_tokens=len(ids), num_sequences=1)), worker.watched(die):
            call = worker.prefill.Embed(message, timeout=timeout_s, metadata=request_metadata(request_id))
            try:
                answer = await call
            except grpc.RpcError as error:
                raise from_rpc(error) from error
            except asyncio.CancelledError:
                if dead is not None and not is_cancelled():
                    raise dead from None
                raise
        return inference_pb2.Embedding(vector=answer.vector)
