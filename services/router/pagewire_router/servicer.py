"""InferenceService: message in, events out; no policy."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

import grpc
from pagewire.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from pagewire_core import tracing
from pagewire_core.errors import DeadlineExceeded, InvalidRequest, PagewireError, from_rpc
from pagewire_core.feed import Feeds
from pagewire_core.prefix_index import IndexFollower, PrefixIndex
from pagewire_core.slow_reader import ended_if_unread
from pagewire_core.telemetry import exposition, merge_expositions

from pagewire_router.account import Account
from pagewire_router.admission import Admission, Slot
from pagewire_router.beam_search import BeamSearch
from pagewire_router.breakers import LEGS
from pagewire_router.chat import fill
from pagewire_router.discovery import Discovery
from pagewire_router.embedding import Embedder, inputs_of
from pagewire_router.explain import explain
from pagewire_router.generation import Generation, Services
from pagewire_router.grammars import Grammars, constrain
from pagewire_router.model import ServedModel
from pagewire_router.request import ValidRequest, validate
from pagewire_router.request_log import RequestLog
from pagewire_router.request_templates import RequestTemplates
from pagewire_router.spans import describe_request
from pagewire_router.text import detokenize, tokenize, tokenizer_info
from pagewire_router.workers import Worker

_METRICS_TIMEOUT_S = 1.0
_RESET_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Timeouts:
    """request_s: of a request in all; send_s: in which its client may take nothing."""

    request_s: float
    send_s: float


@dataclass(frozen=True)
class Router:
    """Everything the servicer stands on, made once by `main`."""

    model: ServedModel
    services: Services
    admission: Admission
    index: PrefixIndex
    follower: IndexFollower
    discovery: Discovery | None  # None: there is no Redis
    timeouts: Timeouts
    feeds: Feeds[inference_pb2.DeltaFeedResponse]
    grammars: Grammars
    templates: RequestTemplates
    asked: RequestLog | None  # None: what clients ask is not logged
    flags: Mapping[str, str]  # that it was started with

    @property
    def redis_connected(self) -> bool:
        return self.discovery is not None and self.discovery.connected

    @property
    def max_model_len(self) -> int:
        return min(self.model.max_model_len, self.services.workers.max_model_len or self.model.max_model_len)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, router: Router) -> None:
        self._router = router

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        metrics, arrived = self._router.services.metrics, time.monotonic()
        with tracing.begin("llm_request") as span:
            try:
                valid = await self._validated(request)
                await constrain(valid, request, self._router.grammars, self._router.model.own_eos_token_ids)
            except PagewireError:
                metrics.requests.labels("invalid_request").inc()
                raise
            metrics.validation_s.observe(time.monotonic() - arrived)
            if self._router.asked is not None:
                self._router.asked.generate(valid, request)
            describe_request(span, valid)
            responses = self._counted(request, valid, self._deadline(context))
            async with contextlib.aclosing(ended_if_unread(responses, context, self._router.timeouts.send_s)) as read:
                async for response in read:
                    yield response

    async def _validated(self, request: inference_pb2.GenerateRequest) -> ValidRequest:
        rendered = await self._rendered(request)
        valid = validate(request, self._router.model, self._router.max_model_len, rendered)
        most = self._router.services.workers.max_choices(valid.is_one_token)
        if most is not None and valid.n > most:  # else it would wait, and all behind it, until nothing runs
            raise InvalidRequest(f"n must be at most {most} (--max-num-seqs), not {valid.n}", param="n")
        return valid

    async def _rendered(self, request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> str | None:
        """The text of a chat that brings a template; what it does not say to any template is filled in."""
        if request.WhichOneof("prompt") != "chat":
            return None
        fill(request.chat, self._router.model.template_kwargs)
        return await self._router.templates.prompt_of(request.chat)

    async def DeltaFeed(
        self, request: inference_pb2.DeltaFeedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[inference_pb2.DeltaFeedResponse, None]:
        batches = self._router.feeds.serve(request.feed_id)
        async with contextlib.aclosing(ended_if_unread(batches, context, self._router.timeouts.send_s)) as read:
            async for batch in read:
                yield batch

    async def _counted(
        self, request: inference_pb2.GenerateRequest, valid: ValidRequest, deadline: float
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The responses, which say how many entries of the client's feed belong to them."""
        # What is told of a prompt, or at the end of a search, is too much to hold up what others get by the feed.
        at_once = valid.prompt_logprobs is not None or valid.length_penalty is not None
        feed = None if at_once else self._router.feeds.get(request.feed_id)
        num_entries = 0

        def send(delta: inference_pb2.Delta) -> None:
            nonlocal num_entries
            assert feed is not None
            entry, new = feed.entry(request.feed_call)
            entry.deltas.append(delta)
            num_entries += new

        with feed.used() if feed else contextlib.nullcontext():
            async with contextlib.aclosing(self._generate(valid, deadline, send if feed else None)) as responses:
                async for response in responses:
                    response.feed_entries = num_entries
                    yield response

    async def _generate(
        self, request: ValidRequest, deadline: float, send: Callable[[inference_pb2.Delta], None] | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        router, services = self._router, self._router.services
        num_tokens = len(request.prompt_ids)
        slot = Slot(num_tokens, request.tenant, request.priority, n=request.n, deadline=deadline)
        account = Account(request.request_id, num_tokens, slot)
        generation: Generation | BeamSearch
        if request.length_penalty is None:
            generation = Generation(request, services, account, deadline, send)
        else:
            generation = BeamSearch(request, services, account, deadline)
        outcome = "rejected"
        services.metrics.asked_length.observe(request.sampling.max_tokens)
        services.metrics.asked_choices.observe(request.n)
        try:
            async with router.admission.slot(slot):
                outcome = ""  # the generation knows
                account.admit(services.metrics)
                async with contextlib.aclosing(generation.responses()) as responses:
                    async for response in responses:
                        yield response
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except DeadlineExceeded:
            outcome = outcome and "deadline"  # while it waited for admission
            raise
        finally:
            account.close(outcome or generation.outcome, generation.answer_tokens, services.metrics)

    def _deadline(self, context: grpc.aio.ServicerContext) -> float:
        """On the loop's clock: what this router allows, or less if the client does not wait so long."""
        allowed_s, left_s = self._router.timeouts.request_s, context.time_remaining()
        return asyncio.get_running_loop().time() + (allowed_s if left_s is None else min(allowed_s, left_s))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        workers = self._router.services.workers
        model, ready = self._router.model, workers.usable
        response = inference_pb2.ListModelsResponse(models=[model.description] * len(model.names))
        for name, one in zip(model.names, response.models, strict=True):
            one.name, one.ready, one.max_model_len = name, ready, self._router.max_model_len
            one.max_concurrent_requests = self._router.admission.max_requests
            one.kv_tokens = sum(w.stats.total_blocks * w.info.block_size for w in workers.live if w.can_decode)
        return response

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.EmbedResponse:
        router = self._router
        inputs = inputs_of(request, router.model, router.max_model_len)
        embedder = Embedder(router.services.workers, router.admission)
        request_id = request.request_id or uuid.uuid4().hex
        if router.asked is not None:
            router.asked.embed(request_id, request.tenant, inputs)
        with tracing.begin("embed", {"gen_ai.request.id": request_id, "pagewire.inputs": len(inputs)}):
            vectors = await embedder.embed(inputs, request_id, request.tenant, self._deadline(context))
        return inference_pb2.EmbedResponse(
            model=request.model or router.model.names[0],
            embeddings=vectors,
            prompt_tokens=sum(map(len, inputs)),
        )

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        response = tokenize(request, self._router.model, await self._rendered(request))
        response.max_model_len = self._router.max_model_len
        return response

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        return detokenize(request, self._router.model)

    async def TokenizerInfo(
        self, request: inference_pb2.TokenizerInfoRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizerInfoResponse:
        return tokenizer_info(request, self._router.model)

    async def Status(
        self, request: inference_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.StatusResponse:
        router = self._router
        return inference_pb2.StatusResponse(
            workers=[_status(w) for w in router.services.workers.live],
            queued_requests=router.admission.num_queued,
            running_requests=router.admission.num_running,
            redis_connected=router.redis_connected,
            indexed_blocks=router.index.num_blocks,
        )

    async def ServerInfo(
        self, request: inference_pb2.ServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ServerInfoResponse:
        workers = self._router.services.workers.live
        told = [inference_pb2.WorkerFlags(worker_id=w.worker_id, flags=w.info.flags) for w in workers]
        return inference_pb2.ServerInfoResponse(flags=self._router.flags, workers=told)

    async def ResetPrefixCache(
        self, request: worker_pb2.ResetPrefixCacheRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ResetPrefixCacheResponse:
        workers = self._router.services.workers.live
        try:
            answers = await asyncio.gather(*(_reset(w, request) for w in workers))
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        return worker_pb2.ResetPrefixCacheResponse(num_blocks=sum(answer.num_blocks for answer in answers))

    async def Metrics(
        self, request: inference_pb2.MetricsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.MetricsResponse:
        router, metrics = self._router, self._router.services.metrics
        metrics.running.set(router.admission.num_running)
        metrics.queued.set(router.admission.num_queued)
        metrics.queued_tokens.set(router.admission.queued_tokens)
        metrics.index_blocks.set(router.index.num_blocks)
        metrics.index_age.set(router.index.oldest_s)
        metrics.index_level.set(router.follower.level)
        metrics.redis_connected.set(router.redis_connected)
        states = [(breaker.leg, state) for breaker, state, _ in router.services.placement.breakers]
        for leg in LEGS:
            metrics.circuits_open.labels(leg).set(sum(there == leg and s != "closed" for there, s in states))
        workers = router.services.workers.live
        answers = await asyncio.gather(*(_metrics_of(w) for w in workers))
        texts = {metrics.instance: exposition(metrics.registry)}
        texts |= {w.worker_id: text for w, text in zip(workers, answers, strict=True) if text is not None}
        return inference_pb2.MetricsResponse(text=merge_expositions(texts))

    async def Explain(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ExplainResponse:
        valid = await self._validated(request)
        return explain(valid, self._router.services.placement)


def _status(worker: Worker) -> inference_pb2.WorkerStatus:
    stats = worker.stats
    return inference_pb2.WorkerStatus(
        worker_id=worker.worker_id,
        role=worker.role,
        address=worker.address,
        ready=not worker.suspect,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        free_blocks=stats.free_blocks,
        total_blocks=stats.total_blocks or worker.info.total_blocks,
    )


async def _metrics_of(worker: Worker) -> str | None:
    """A worker's own exposition; None if it does not answer in time."""
    with worker.used(), contextlib.suppress(grpc.RpcError):
        answer = await worker.control.Metrics(worker_pb2.WorkerServiceMetricsRequest(), timeout=_METRICS_TIMEOUT_S)
        return answer.text
    return None


async def _reset(worker: Worker, request: worker_pb2.ResetPrefixCacheRequest) -> worker_pb2.ResetPrefixCacheResponse:
    with worker.used():
        return await worker.control.ResetPrefixCache(request, timeout=_RESET_TIMEOUT_S)
