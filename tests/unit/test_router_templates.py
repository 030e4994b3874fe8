"""Chat templates that come with a request: refused by default, and bounded where they are allowed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from fakes import write_byte_tokenizer
from pagewire.v1 import inference_pb2
from pagewire_cli.serve import demo_model
from pagewire_core.chat_template import ChatTemplate
from pagewire_core.errors import InvalidRequest, StartupError, from_rpc
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.chat import fill, render
from pagewire_router.model import load_served_model
from pagewire_router.request_templates import RequestTemplates
from router_scene import scene, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEMPLATE = "{{ bos_token }}{% for d in documents %}[{{ d.title }}]{% endfor %}{% for m in messages %}{{ m.content }}"
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    "{{ 'x' * 10**9 * 4 }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ 'x' * 9000000 }}",
    "{% for m in messages %}",
    "{{ 1 / 0 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{{ '\\ud800' }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


def chat(template: str, **fields: object) -> inference_pb2.Chat:
    message = inference_pb2.ChatMessage(role="user", content="hi")
    return inference_pb2.Chat(messages=[message], chat_template=template, template_kwargs_json=json.dumps(fields))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def templates() -> AsyncIterator[RequestTemplates]:
    made = RequestTemplates(("<s>", "</s>"), trusted=True)
    yield made
    await made.close()


async def test_a_client_that_leaves_while_a_process_starts_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for its first job for ever, and each such client left another one."""
    create, made = asyncio.create_subprocess_exec, list[asyncio.subprocess.Process]()

    async def noted(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        made.append(await create(*command, **options))
        return made[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    asking = asyncio.create_task(RequestTemplates(("<s>", "</s>"), trusted=True).prompt_of(chat("x")))
    await until(lambda: bool(made))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert made[0].returncode == -signal.SIGKILL


async def test_a_chat_is_rendered_by_the_template_it_brings(templates: RequestTemplates) -> None:
    documents = [{"title": "A", "text": "x"}, {"title": "é"}]
    assert await templates.prompt_of(chat(TEMPLATE, documents=documents)) == "<s>[A][é]hi>"
    assert await templates.prompt_of(chat("")) is None
    with pytest.raises(InvalidRequest, match="template variables cannot be replaced"):
        await templates.prompt_of(chat(TEMPLATE, messages=[]))


async def test_none_is_allowed_unless_the_server_trusts_them() -> None:
    with pytest.raises(InvalidRequest, match="--trust-request-chat-template") as caught:
        await RequestTemplates(("", ""), trusted=False).prompt_of(chat(TEMPLATE))
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:40])
async def test_a_hostile_template_is_refused_in_a_sentence(templates: RequestTemplates, template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await templates.prompt_of(chat(template))
    assert 10 < len(caught.value.message) < 600 and "\n" not in caught.value.message


async def test_a_template_that_kills_its_process_holds_nobody_up(templates: RequestTemplates) -> None:
    """The loop goes on, and others have theirs."""
    hostile = asyncio.create_task(templates.prompt_of(chat(LOOPS)))
    others = 0
    while not hostile.done():
        assert await templates.prompt_of(chat(TEMPLATE, documents=[])) == "<s>hi>"
        await asyncio.sleep(0.05)
        others += 1
    assert others > 3 and "too much time or memory" in str(hostile.exception())


async def test_variables_that_a_chat_does_not_set_are_the_servers(tmp_path: Path) -> None:
    """Whose template it is makes no difference."""
    write_byte_tokenizer(tmp_path)
    template = "{{ mood }}{{ messages[0].content }}"
    flags: Any = {"trust_request_chat_template": True, "template_kwargs": {"mood": "glad ", "other": 1}}
    async with scene(Tokenizer(tmp_path), "b1", **flags) as s:
        for said, text in ((chat(template), "glad hi"), (chat(template, mood="sad "), "sad hi")):
            told = await s.stub.Tokenize(inference_pb2.TokenizeRequest(chat=said))
            request = inference_pb2.GenerateRequest(chat=said, return_prompt_token_ids=True)
            accepted = (await anext(aiter(s.stub.Generate(request)))).accepted
            assert told.text == text and [t.id for t in told.tokens] == list(accepted.prompt_token_ids)
    mine = inference_pb2.Chat(messages=[{"role": "user", "content": "hi"}])
    fill(mine, {"mood": "glad "})
    assert render(mine, ChatTemplate(template, "<s>", "</s>")) == "glad hi"


@pytest.mark.parametrize("text", ["{", "[]", '{"messages": []}'])
async def test_default_variables_that_no_template_could_have_end_the_start(text: str) -> None:
    with pytest.raises(StartupError, match="--default-chat-template-kwargs: "):
        load_served_model(str(demo_model()), default_chat_template_kwargs=text)


async def test_a_router_renders_counts_and_refuses(tmp_path: Path) -> None:
    """Generate, Tokenize and Explain have the same prompt; the model's own template is for all others."""
    write_byte_tokenizer(tmp_path)
    request = inference_pb2.GenerateRequest(chat=chat(TEMPLATE, documents=[]), return_prompt_token_ids=True)
    asked = inference_pb2.TokenizeRequest(chat=request.chat)
    async with scene(Tokenizer(tmp_path), "b1", trust_request_chat_template=True) as s:
        accepted = (await anext(aiter(s.stub.Generate(request)))).accepted
        told = await s.stub.Tokenize(asked)
        assert told.text == "<s>hi>" and [t.id for t in told.tokens] == list(accepted.prompt_token_ids)
        assert (await s.stub.Explain(request)).prompt_tokens == accepted.prompt_tokens == len(told.tokens)
        request.chat.chat_template = ""
        assert (await anext(aiter(s.stub.Generate(request)))).accepted.prompt_tokens > accepted.prompt_tokens
    request.chat.chat_template = TEMPLATE
    async with scene(Tokenizer(tmp_path), "b1") as s:
        for call in (s.stub.Tokenize(asked), s.stub.Explain(request), anext(aiter(s.stub.Generate(request)))):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert from_rpc(refused.value).param == "chat_template"  # type: ignore[attr-defined]
