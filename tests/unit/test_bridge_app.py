"""Around the answers of the real bridge: parameters, ids, headers, and the routes that are not generation."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_router import STOP, Bridge, accepted, delta, says, summary, token

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": "hi"}]


async def test_every_parameter_may_be_null(bridge: Bridge) -> None:
    """Older LangChain and LiteLLM send every parameter they know, as null."""
    names = (
        "n", "stop", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
        "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop_token_ids",
        "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "add_special_tokens",
        "cache_salt", "request_id", "echo", "logprobs", "top_logprobs", "add_generation_prompt",
        "continue_final_message", "chat_template_kwargs", "tools", "tool_choice", "response_format", "user",
        "best_of", "suffix", "functions", "function_call", "model", "prompt_logprobs", "structured_outputs", "audio",
    )  # fmt: skip
    nulls = dict.fromkeys(names)
    assert (await bridge.chat(**nulls)).status_code == 200
    assert (await bridge.complete(**nulls)).status_code == 200


async def test_ignored_fields_are_named_in_a_header_that_cannot_be_broken(bridge: Bridge) -> None:
    response = await bridge.chat(
        **{"safety_identifier": "u", "wat": 1, "a\r\nset-cookie: x": 1, "stream": True, "stream_options": {"odd": 1}}
    )
    assert response.status_code == 200
    assert response.headers["x-pagewire-ignored-fields"] == "safety_identifier,stream_options.odd,wat"
    assert "set-cookie" not in response.headers


USER = {"messages": MESSAGES, "model": "demo"}
PROMPT = {"inputs": "hi", "parameters": {"max_tokens": 3, "nothing": None, "seed": None}, "max_new_tokens": 3}
TENSOR = {"name": "text_input", "data": ["hi"]}


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/generate", PROMPT, "max_new_tokens,parameters.max_tokens"),
        ("/generate_stream", PROMPT, "max_new_tokens,parameters.max_tokens"),
        ("/", {**PROMPT, "stream": True}, "max_new_tokens,parameters.max_tokens"),
        ("/invocations", PROMPT, "max_new_tokens,parameters.max_tokens"),
        ("/vertex", {"instances": [PROMPT, PROMPT], "odd": 1},
         "instances.max_new_tokens,instances.parameters.max_tokens,odd"),
        ("/v2/models/demo/infer", {"inputs": [TENSOR], "parameters": {"odd": 1}, "more": 1}, "more,parameters.odd"),
        ("/tokenize", {"inputs": "hi", "odd": 1}, "odd"),
        ("/tokenize", {"prompt": "hi", "odd": 1}, "odd"),
        ("/tokenize", {**USER, "odd": 1}, "odd"),
        ("/chat_tokenize", {**USER, "odd": 1}, "odd"),
        ("/detokenize", {"tokens": [5], "odd": 1}, "odd"),
        ("/api/show", {"model": "demo", "odd": 1}, "odd"),
        ("/api/chat", {**USER, "odd": 1, "options": {"num_gpu": 1, "main_gpu": None}}, "odd,options.num_gpu"),
        ("/v1/messages/count_tokens", {**USER, "odd": 1, "thinking": {"type": "enabled"}}, "odd,thinking"),
        ("/v1/messages", {**USER, "max_tokens": 3, "metadata": {"odd": 1, "user_id": "u"}}, "metadata.odd"),
        ("/v1/chat/completions", {**USER, "odd": 1, "stream_options": {"odd": 1}, "stream": True},
         "odd,stream_options.odd"),
        # What OpenAI's routes refuse is no field of these.
        ("/generate", {"inputs": "hi", "suffix": "x", "modalities": ["text"], "parameters": {"watermarking": True}},
         "parameters.watermarking,suffix"),
        ("/v1/messages", {**USER, "max_tokens": 3, "web_search_options": {}, "watermarking": False, "mcp_servers": []},
         "web_search_options"),
        ("/api/generate", {"model": "demo", "prompt": "hi", "audio": {}}, "audio"),
        ("/v1/responses", {"input": "hi", "odd": 1, "text": {"format": {"type": "text", "odd": 1}}},
         "odd,text.format.odd"),
    ],
)  # fmt: skip
async def test_every_route_names_what_had_no_effect_but_not_null(
    bridge: Bridge, path: str, body: dict[str, Any], names: str
) -> None:
    bridge.router.script = says(accepted(), delta("hi", tokens=[token(b"hi", -1.0)], finish=STOP), summary())
    for nothing in ({}, {"nothing": None}):
        response = await bridge.http.post(path, json={**body, **nothing})
        assert response.status_code == 200, response.text
        assert response.headers["x-pagewire-ignored-fields"] == names


async def test_a_grammar_that_is_no_schema_is_told_by_its_name(bridge: Bridge) -> None:
    for text in ("5", "{"):
        grammar = {"type": "json", "value": text}
        response = await bridge.http.post("/generate", json={"inputs": "x", "parameters": {"grammar": grammar}})
        assert response.status_code == 422 and response.json()["error"].startswith("`grammar.value` ")


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(("name", "value"), [("mcp_servers", [{"type": "url"}]), ("container", "c")])
async def test_what_would_give_another_message_is_refused(bridge: Bridge, path: str, name: str, value: object) -> None:
    response = await bridge.http.post(path, json={**USER, "max_tokens": 3, name: value})
    assert response.status_code == 400 and f"`{name}`" in response.json()["error"]["message"]


async def test_the_request_id_comes_from_the_header_then_the_body_then_us(bridge: Bridge) -> None:
    body = {"messages": MESSAGES, "request_id": "from-body"}
    for header, fields, expected in (
        ({"X-Request-Id": "from-header"}, body, "from-header"),
        ({"X-Request-Id": "not sane\t!"}, body, "from-body"),
        ({}, body, "from-body"),
    ):
        response = await bridge.http.post("/v1/chat/completions", json=fields, headers=header)
        assert response.headers["x-request-id"] == expected
        assert response.json()["id"] == f"chatcmpl-{expected}"
        assert bridge.router.requests[-1].request_id == expected
    minted = [(await bridge.chat()).headers["x-request-id"] for _ in range(2)]
    assert len(set(minted)) == 2 and all(len(m) == 32 for m in minted)


async def test_anthropics_clients_find_the_request_id_where_they_look(bridge: Bridge) -> None:
    """Also of what was refused: they show it with the error."""
    body = {"model": "demo", "max_tokens": 3, "messages": MESSAGES}
    for path, sent, status in (
        ("/v1/messages", body, 200), ("/v1/messages", {**body, "stream": True}, 200), ("/v1/messages", {}, 400),
        ("/v1/messages/count_tokens", body, 200), ("/v1/messages/none", {}, 404),
    ):  # fmt: skip
        answer = await bridge.http.post(path, json=sent)
        assert answer.status_code == status and answer.headers["request-id"] == answer.headers["x-request-id"]
    assert "request-id" not in (await bridge.chat()).headers


async def test_an_instance_of_vertex_may_be_a_chat(bridge: Bridge) -> None:
    """As in TGI."""
    chat = {"messages": MESSAGES, "max_tokens": 9}
    answer = await bridge.http.post("/vertex", json={"instances": [chat, {"inputs": "hi"}]})
    assert answer.json() == {"predictions": ["Hello", "Hello"]}
    asked = {request.WhichOneof("prompt"): request for request in bridge.router.requests}
    assert asked["chat"].sampling.max_tokens == 9 and asked["chat"].n == 1 and asked["text"].text == "hi"
    for refused in ({"messages": []}, {**chat, "n": 3}):
        answer = await bridge.http.post("/vertex", json={"instances": [refused]})
        assert answer.status_code == 422 and answer.json()["error_type"] == "validation"


async def test_models_are_listed_and_found_by_names_with_slashes(bridge: Bridge) -> None:
    page = await bridge.openai.models.list()
    assert [m.id for m in page.data] == ["demo", "org/name with space"]
    one = await bridge.openai.models.retrieve("org/name with space")
    assert (one.id, one.object, one.owned_by, one.created) == ("org/name with space", "model", "pagewire", 17)
    missing = await bridge.http.get("/v1/models/org/none")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


async def test_health_follows_the_router(bridge: Bridge) -> None:
    healthy = await bridge.http.get("/health")
    assert (healthy.status_code, healthy.content) == (200, b"")
    await bridge.router_server.set_serving(False)
    assert (await bridge.http.get("/health")).status_code == 503
    await bridge.router_server.set_serving(True)
    assert (await bridge.http.get("/health")).status_code == 200


async def test_version_and_metrics_are_served(bridge: Bridge) -> None:
    assert set((await bridge.http.get("/version")).json()) == {"version"}
    await bridge.chat()
    response = await bridge.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'pagewire_x_total{instance="router"} 2.0' in response.text
    assert (
        'pagewire_bridge_requests_total{instance="bridge",route="/v1/chat/completions",status="200"}' in response.text
    )


async def test_a_tier_that_was_asked_for_is_told(bridge: Bridge) -> None:
    for asked, told in (("auto", "default"), ("flex", "flex")):
        assert (await bridge.chat(service_tier=asked)).json()["service_tier"] == told
    assert "service_tier" not in (await bridge.chat()).json()
    assert (await bridge.chat(service_tier="gold")).status_code == 400


async def test_what_the_proxy_allows_bounds_the_call(bridge: Bridge) -> None:
    body = {"messages": MESSAGES}
    for allowed, expected in (
        ("1500", 1.5),
        ("0", None),
        ("soon", None),
        ("99999999", None),
        ("9" * 400, None),
        ("9" * 5000, None),
    ):
        headers = {"x-envoy-expected-rq-timeout-ms": allowed}
        assert (await bridge.http.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
        left_s = bridge.router.time_remaining
        assert left_s is not None and (left_s <= 2) == (expected == 1.5)


async def test_the_seed_of_tgis_answer_is_the_routers(bridge: Bridge) -> None:
    """So --seed is for all routes: this one drew seeds of its own, that were never the same."""
    opened = accepted()
    opened.accepted.seed = 11
    bridge.router.script = says(opened, delta("hi", tokens=[token(b"hi", -1.0)], finish=STOP), summary())
    for parameters, seed in (({"do_sample": True}, 11), ({}, None)):
        body = {"inputs": "x", "parameters": {"details": True, **parameters}}
        answer = await bridge.http.post("/generate", json=body)
        assert answer.json()["details"]["seed"] == seed
        assert not bridge.router.requests[-1].sampling.HasField("seed")
