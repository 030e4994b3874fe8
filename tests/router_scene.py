"""A real router over real gRPC with scripted workers, for the router's tests."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fakes import DIGEST, TEMPLATE, FakeWorker, Script
from pagewire.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from pagewire_core.block_events import STORED
from pagewire_core.block_hash import block_hashes, chain_root
from pagewire_core.chat_template import ChatTemplate
from pagewire_core.flags import FLAGS, ROUTER_FLAGS
from pagewire_core.rpc import open_channel
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.main import running_router
from pagewire_router.model import ServedModel
from pagewire_router.servicer import Router

EOS = 257
PROMPT = "the quick brown fox " * 10  # 200 tokens: three whole blocks
ROLES = {
    "p": common_pb2.WORKER_ROLE_PREFILL,
    "d": common_pb2.WORKER_ROLE_DECODE,
    "b": common_pb2.WORKER_ROLE_BOTH,
}


@dataclass
class Scene:
    """Workers by name ("p1", "d1": the first letter is the role) and a router that knows them."""

    workers: dict[str, FakeWorker]
    router: Router
    stub: inference_pb2_grpc.InferenceServiceStub
    tokenizer: Tokenizer
    address: str

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def ask(self, text: str = "hello", **fields: Any) -> Answer:
        """Sends a request and reads the answer to its end."""
        answer = Answer()
        async for response in self.stub.Generate(request(text, **fields)):
            answer.add(response)
        return answer

    async def settle(self) -> None:
        """Waits until no worker serves anything and the router has forgotten every request."""
        await until(lambda: not any(w.open_calls for w in self.workers.values()))
        await until(lambda: self.router.admission.num_running == 0)


class Answer:
    """What a client got, with the contract's order checked on the way."""

    def __init__(self) -> None:
        self.responses: list[inference_pb2.GenerateResponse] = []
        self.text: dict[int, str] = {}
        self.ids: dict[int, list[int]] = {}
        self.finish: dict[int, inference_pb2.Delta] = {}
        self.summary: inference_pb2.Summary | None = None
        self.error: common_pb2.Error | None = None

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        assert (kind == "accepted") == (not self.responses)
        assert self.summary is None
        assert self.error is None
        self.responses.append(response)
        if kind == "delta":
            delta = response.delta
            assert delta.choice not in self.finish, "a choice that ended got more"
            self.text[delta.choice] = self.text.get(delta.choice, "") + delta.text
            self.ids.setdefault(delta.choice, []).extend(t.token_id for t in delta.tokens)
            if delta.finish_reason:
                self.finish[delta.choice] = delta
        elif kind == "summary":
            self.summary = response.summary
        elif kind == "error":
            self.error = response.error


def request(text: str = "hello", **fields: Any) -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(**fields.pop("sampling", {}))
    return inference_pb2.GenerateRequest(text=text, sampling=sampling, **fields)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def scene(
    tokenizer: Tokenizer,
    names: str,
    reply: str = "hello world",
    eos: bool = True,
    template_kwargs: Mapping[str, Any] | None = None,
    **flags: Any,
) -> AsyncIterator[Scene]:
    """Starts workers that all answer `reply` (and an end of sequence) and a router; stops everything at the end."""
    tokens = [*tokenizer.encode(reply, add_special_tokens=False), *([EOS] if eos else [])]
    peers: dict[str, FakeWorker] = {}
    workers = {name: FakeWorker(name, ROLES[name[0]], Script(tokens), peers) for name in names.split()}
    template, texts = ChatTemplate(TEMPLATE, "<s>", "</s>"), ("<s>", "</s>")
    model = ServedModel(("demo",), "demo", DIGEST, 256, 258, (EOS,), tokenizer, template,
                        template_kwargs=template_kwargs or {}, special_texts=texts)  # fmt: skip
    async with contextlib.AsyncExitStack() as started:
        for worker in workers.values():
            await worker.start()
            started.push_async_callback(worker.kill)
        values = {name.replace("-", "_"): FLAGS[name].default for name in ROUTER_FLAGS} | {
            "max_queued_requests": 16, "request_timeout": 20.0, "send_timeout": 10.0, "transfer_timeout": 5.0,
            "workers": ",".join(w.address for w in workers.values()), **flags,
        }  # fmt: skip
        router, _, port = await started.enter_async_context(running_router(argparse.Namespace(**values), model))
        await until(lambda: len(router.services.workers.live) >= len(workers))
        await until(
            lambda: all(w.feed.is_open for w in router.services.workers.live if FakeWorker.feed and w.can_decode)
        )
        channel = await started.enter_async_context(open_channel(f"127.0.0.1:{port}"))
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        yield Scene(workers, router, stub, tokenizer, f"127.0.0.1:{port}")


async def give_prefix(s: Scene, *names: str) -> None:
    """The index learns that these workers have the prompt's whole blocks."""
    hashes = block_hashes(chain_root(b"f" * 32), s.ids(PROMPT))
    await until(lambda: set(names) <= set(s.router.index.worker_ids))
    for name in names:
        s.router.index.apply(name, 1, [(STORED, hashes)])
