"""Every parser of bytes from outside, with bytes that nobody sane sends: an error in its own words, and life goes on.

Seeded and short here; `make fuzz` takes other examples every time, and many of them.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from fakes import DIGEST, TEMPLATE, RedisServer, write_byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_endpoints import Ends, ends, identity, random_kv
from pagewire.v1 import common_pb2, inference_pb2
from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.block_events import STORED, pack_event, snapshot_key, stream_key, unpack_events
from pagewire_core.chat_template import ChatTemplate
from pagewire_core.errors import ERROR_METADATA_KEY, InvalidRequest, PagewireError, from_rpc
from pagewire_core.prefix_index import IndexFollower, PrefixIndex, Snapshot
from pagewire_core.redis_link import open_redis
from pagewire_core.registry import RegisteredWorker, list_workers
from pagewire_core.rpc import open_channel
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.model import ServedModel
from pagewire_router.request import validate
from scripted_router import STOP, Bridge, ScriptedRouter, accepted, delta, running_bridge, says, summary

EXAMPLES = int(os.environ.get("PAGEWIRE_FUZZ_EXAMPLES", "0"))
SEED = random.SystemRandom().randrange(1 << 32) if EXAMPLES else 0
FUZZ = settings(max_examples=EXAMPLES or 100, derandomize=not EXAMPLES, suppress_health_check=list(HealthCheck))
LIMIT = 100
MODEL = b"m" * 32

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


# ---------------------------------------------------------------- blocks and workers in Redis


@given(st.binary(max_size=200))
@FUZZ
def test_block_events_are_whole_or_refused(data: bytes) -> None:
    try:
        events = list(unpack_events(data))
    except ValueError:
        return
    assert b"".join(pack_event(kind, hashes) for kind, hashes in events) == data


def _junk(rng: random.Random) -> bytes:
    return rng.choice((b"", b"-1", b"9" * 40, b"1.5", b"nan", "ü".encode("latin1"), rng.randbytes(rng.randrange(40))))


async def test_a_redis_that_others_write_to_hurts_no_router(redis_server: RedisServer) -> None:
    """One entry with bytes that are no UTF-8 ended the router; one key of another type hid all workers."""
    rng = random.Random(SEED)
    index = PrefixIndex()

    async def nobody(worker_id: str) -> Snapshot | None:
        return None

    follower = IndexFollower(redis_server.url, index, nobody)
    index.join("w", "i", MODEL)
    following = asyncio.create_task(follower.run())
    good = RegisteredWorker("w", "i", "127.0.0.1:1", "decode")
    block, redis = b"b" * 16, open_redis(redis_server.url)
    try:
        await redis.hset("pd:w:w", mapping={"instance": "i", "address": "127.0.0.1:1", "role": "decode"})
        await redis.zadd("pd:w", {"w": 1})
        for number in range(1, max(EXAMPLES, 60) + 1):
            name = b"x%d" % number + _junk(rng)
            await redis.zadd("pd:w", {name: 2})
            if rng.random() < 0.3:
                await redis.set(b"pd:w:" + name, b"no hash")
            else:
                fields: dict[Any, Any] = {
                    key: _junk(rng) for key in ("instance", "address", "role") if rng.random() < 0.9
                }
                await redis.hset(b"pd:w:" + name, mapping=fields or {"x": "y"})
            assert [w for w in await list_workers(redis) if w.worker_id == "w"] == [good]
            entry: dict[Any, Any] = {"w": b"w", "i": b"i", "s": _junk(rng), "e": _junk(rng)}
            for key in rng.sample(sorted(entry), rng.randrange(3)):
                entry[key] = _junk(rng)
            await redis.xadd(stream_key(MODEL), entry)
            stored: dict[Any, Any] = {
                key: _junk(rng) for key in ("instance", "sequence", "hashes") if rng.random() < 0.8
            }
            await redis.hset(snapshot_key(MODEL, "w"), mapping={**(stored or {"x": "y"}), "instance": "i"})
        await redis.delete(snapshot_key(MODEL, "w"))
        known = index.sequence_of("w")
        packed: dict[Any, Any] = {"w": "w", "i": "i", "s": known + 10**6, "e": pack_event(STORED, [block])}
        await redis.xadd(stream_key(MODEL), packed)
        async with asyncio.timeout(20):
            while not index.match([block]):
                assert not following.done()
                await asyncio.sleep(0.02)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await redis.aclose()


# ---------------------------------------------------------------- the KV channel


def _message(rng: random.Random, instance: str, theirs: bytes) -> bytes:
    """A message as a peer sends it, or one that was bent on its way. theirs: a transfer of another pair."""
    tid = rng.choice((b"t" * 16, b"u" * 16, theirs, b"", rng.randbytes(16), rng.randbytes(100)))
    number = lambda: rng.choice((0, 1, 2, 3, 7, 64, 2**31, 2**32 - 1))  # noqa: E731
    request = rng.choice((
        kv.ConnectRequest(hello=identity("liar").hello(instance, ["grpc"])),
        kv.ConnectRequest(store_put=kv.StorePut(key=rng.choice("abc"), value=rng.randbytes(9))),
        kv.ConnectRequest(offer=kv.Offer(transfer_id=tid, token_begin=number() % 99, token_end=number() % 99)),
        kv.ConnectRequest(chunk=kv.Chunk(
            transfer_id=tid, seq=number(), layer_begin=number(), layer_end=number(), token_begin=number(),
            token_end=number(), num_bytes=number(), checksum=rng.getrandbits(64), data=rng.randbytes(number() % 99))),
        kv.ConnectRequest(sealed=kv.Sealed(transfer_id=tid, num_chunks=number(), root_checksum=rng.getrandbits(64))),
        kv.ConnectRequest(abort=kv.Abort(transfer_id=tid, error=common_pb2.Error(code=number() % 12))),  # type: ignore[arg-type]
        kv.ConnectRequest(),
    ))  # fmt: skip
    data = bytearray(request.SerializeToString())
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data) if rng.random() < 0.9 else rng.randbytes(rng.randrange(60))


async def _talk(both: Ends, rng: random.Random, theirs: bytes) -> None:
    """One connection of a peer that keeps to no rules; the server ends it when it has heard enough."""
    async with open_channel(both.address) as channel:
        connect = channel.stream_stream("/pagewire.v1.KvChannelService/Connect")  # bytes in, bytes out
        call = connect()
        messages = [_message(rng, both.instance, theirs) for _ in range(rng.randrange(1, 12))]
        if rng.random() < 0.9:
            hello = identity("liar").hello(both.instance, ["grpc"])
            messages.insert(0, kv.ConnectRequest(hello=hello).SerializeToString())
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
            async with asyncio.timeout(30):
                while await call.read() is not grpc.aio.EOF:
                    pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        finally:
            call.cancel()


async def test_a_peer_that_keeps_to_no_rules_ends_its_own_stream_alone(frozen_heap: None) -> None:
    rng = random.Random(SEED)
    async with ends("grpc", window=2, timeout_s=30) as both:
        for _ in range(max(EXAMPLES, 60)):
            prompt = random_kv(both.sink.layout, 12, seed=rng.randrange(100))
            outgoing = await both.open(prompt)
            await _talk(both, rng, outgoing.transfer_id)
            outgoing.extend(12)
            await outgoing.seal([common_pb2.SampledToken(token_id=7)])
            assert both.sink.pages[outgoing.transfer_id].equal(prompt)
        await both.assert_empty()


# ---------------------------------------------------------------- requests


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory)
    template = ChatTemplate(TEMPLATE, "<s>", "</s>")
    return ServedModel(("demo",), "demo", DIGEST, LIMIT, 258, (257,), Tokenizer(directory), template)


@given(data=st.binary(max_size=120), text=st.text(max_size=300), kwargs=st.text(max_size=30), which=st.integers(0, 3))
@FUZZ
def test_a_request_is_valid_or_refused(served: ServedModel, data: bytes, text: str, kwargs: str, which: int) -> None:
    request = inference_pb2.GenerateRequest(text=text)
    if which == 1:
        request.token_ids.ids.extend(data)
    if which == 2:
        message = inference_pb2.ChatMessage(role="user", content=text)
        request.chat.CopyFrom(inference_pb2.Chat(messages=[message], template_kwargs_json=kwargs))
    try:
        request.sampling.MergeFromString(data)
        if which == 3:
            request.MergeFromString(data)
    except Exception:  # a message that protobuf itself refuses does not get as far
        return
    try:
        valid = validate(request, served, LIMIT)
    except PagewireError:
        return
    assert 0 < len(valid.prompt_ids) < LIMIT and 0 < valid.sampling.max_tokens <= LIMIT - len(valid.prompt_ids)


@pytest.mark.parametrize(
    "kwargs", ["[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "{}x", "1", '{"messages": 1}']
)
def test_template_variables_that_are_no_small_object_are_refused(served: ServedModel, kwargs: str) -> None:
    message = inference_pb2.ChatMessage(role="user", content="x")
    chat = inference_pb2.Chat(messages=[message], template_kwargs_json=kwargs)
    with pytest.raises(InvalidRequest):
        validate(inference_pb2.GenerateRequest(chat=chat), served, LIMIT)


@given(variables=st.dictionaries(st.text(max_size=10), json_values, max_size=4), text=st.text(max_size=40))
@FUZZ
def test_a_template_takes_any_variables(variables: dict[str, Any], text: str) -> None:
    source = "{% for m in messages %}{{ m.role }}{{ m.content | trim }}{{ x | length }}{{ tools | tojson }}{% endfor %}"
    try:
        ChatTemplate(source).render([{"role": "user", "content": text}], kwargs={**variables})
    except InvalidRequest:
        pass


@given(st.binary(max_size=60))
@FUZZ
def test_an_error_that_is_none_of_ours_is_still_an_error(data: bytes) -> None:
    trailing = grpc.aio.Metadata((ERROR_METADATA_KEY, data))
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), trailing, "strange")
    found = from_rpc(error)
    assert isinstance(found, PagewireError)


# ---------------------------------------------------------------- HTTP

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize",
    "/detokenize", "/api/show", "/api/generate", "/api/chat", "/v1/messages", "/v1/messages/count_tokens",
    "/v2/models/demo/infer", "/invocations", "/vertex",
)  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "inputs", "stream", "max_tokens", "n", "stop", "logit_bias", "parameters", "options",
    "temperature", "tools", "response_format", "echo", "logprobs", "raw", "system", "role", "content", "format", "seed",
)  # fmt: skip


def _body(rng: random.Random, depth: int = 0) -> Any:
    simple = (None, True, 0, -1, 1.5, "", "demo", "user", "x" * 300, "\u0000", [], {}, "hi")
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(simple)
    if rng.random() < 0.4:
        return [_body(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(FIELDS): _body(rng, depth + 1) for _ in range(rng.randrange(5))}


def _bytes(rng: random.Random) -> bytes:
    body = {rng.choice(FIELDS): _body(rng) for _ in range(rng.randrange(6))}
    if rng.random() < 0.5:
        body = {
            "prompt": "hi",
            "messages": [{"role": "user", "content": "hi"}],
            "inputs": "hi",
            "model": "demo",
            **body,
        }
    text = bytearray(orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS) if rng.random() < 0.9 else b"[" * 5000)
    for _ in range(rng.choice((0, 0, 1))):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


async def _tokenize(self: object, request: inference_pb2.TokenizeRequest, context: object) -> Any:
    return inference_pb2.TokenizeResponse(text="hi", tokens=[inference_pb2.Token(id=1, bytes=b"hi")])


async def _detokenize(self: object, request: inference_pb2.DetokenizeRequest, context: object) -> Any:
    return inference_pb2.DetokenizeResponse(text="hi")


@pytest.fixture
async def bridge(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bridge]:
    monkeypatch.setattr(ScriptedRouter, "Tokenize", _tokenize)
    monkeypatch.setattr(ScriptedRouter, "Detokenize", _detokenize)
    async with running_bridge() as running:
        spoken = [inference_pb2.TokenText(token_id=1, bytes=b"hi")]
        running.router.script = says(accepted(), delta("hi", tokens=spoken), delta(finish=STOP), summary(1))
        yield running


async def test_no_body_makes_a_fault(bridge: Bridge) -> None:
    rng = random.Random(SEED)
    for _ in range(max(EXAMPLES, 20)):
        for path in PATHS:
            body = _bytes(rng)
            response = await bridge.http.post(path, content=body)
            assert response.status_code < 500 or response.status_code in (501, 503), (path, body, response.text)
