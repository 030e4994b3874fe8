"""Bodies to requests, as tables: every field's way, and every mistake's field."""

from __future__ import annotations

import math
from typing import Any

import orjson
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1.inference_pb2 import GenerateRequest, TokenText
from pagewire_bridge.openai.body import ignored_fields, parse_body
from pagewire_bridge.openai.responses.translate import parse_body as parse_response
from pagewire_bridge.openai.responses.translate import to_chat_body
from pagewire_bridge.openai.schema import ChatBody, CompletionBody
from pagewire_bridge.openai.shapes import TextOffsets
from pagewire_bridge.openai.translate import to_chat_request, to_completion_requests
from pagewire_core.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "so"}


def chat(**fields: Any) -> GenerateRequest:
    body = parse_body(ChatBody, orjson.dumps({"messages": [USER], **fields}))
    return to_chat_request(body, "id")


def completions(**fields: Any) -> list[GenerateRequest]:
    body = parse_body(CompletionBody, orjson.dumps({"prompt": "hi", **fields}))
    return to_completion_requests(body, "id")


def as_dict(request: GenerateRequest) -> dict[str, Any]:
    return MessageToDict(request, preserving_proto_field_name=True)


def test_a_bare_chat_leaves_every_default_to_the_router() -> None:
    expected = {
        "request_id": "id", "chat": {"messages": [USER]}, "sampling": {}, "n": 1, "model_sampling_defaults": True
    }  # fmt: skip
    assert as_dict(chat()) == expected
    assert as_dict(chat(model=None, temperature=None, stop=None, n=None, logprobs=False)) == expected


def test_a_bare_completion_asks_for_16_tokens() -> None:
    (request,) = completions()
    assert as_dict(request) == {
        "request_id": "id",
        "text": "hi",
        "sampling": {"max_tokens": 16},
        "n": 1,
        "completion_default_length": True,
        "model_sampling_defaults": True,
    }


@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 0.5, "temperature", 0.5),
        ("top_p", 1, "top_p", 1.0),
        ("top_k", 40, "top_k", 40),
        ("top_k", -1, "top_k", 0),
        ("top_k", 0, "top_k", 0),
        ("min_p", 0, "min_p", 0.0),
        ("top_k", None, "top_k", None),
        ("min_p", 0.25, "min_p", 0.25),
        ("repetition_penalty", 1.5, "repetition_penalty", 1.5),
        ("presence_penalty", -2, "presence_penalty", -2.0),
        ("frequency_penalty", 2, "frequency_penalty", 2.0),
        ("logit_bias", {"7": -100, "8": 1.5}, "logit_bias", {"7": -100.0, "8": 1.5}),
        ("seed", 3, "seed", "3"),
        ("seed", -1, "seed", str(2**64 - 1)),
        ("max_tokens", 5, "max_tokens", 5),
        ("min_tokens", 2, "min_tokens", 2),
        ("stop", "x", "stop", ["x"]),
        ("stop", ["x", "yy"], "stop", ["x", "yy"]),
        ("stop", [], "stop", None),
        ("stop_token_ids", [1, 2], "stop_token_ids", [1, 2]),
        ("allowed_token_ids", [1, 2], "allowed_token_ids", [1, 2]),
        ("bad_words", ["x"], "bad_words", ["x"]),
        ("bad_words", [], "bad_words", None),
        ("ignore_eos", True, "ignore_eos", True),
        ("include_stop_str_in_output", True, "include_stop_str_in_output", True),
        ("skip_special_tokens", False, "skip_special_tokens", False),
    ],
)
def test_sampling_parameters_reach_the_router_from_both_endpoints(
    field: str, value: object, name: str, expected: object
) -> None:
    for request in (chat(**{field: value}), *completions(**{field: value})):
        assert as_dict(request)["sampling"].get(name) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_chat_logprobs_count_the_alternatives(fields: dict[str, object], expected: int) -> None:
    sampling = chat(**fields).sampling
    assert sampling.HasField("logprobs") and sampling.logprobs == expected


def test_log_probabilities_may_be_those_of_named_tokens() -> None:
    named: list[dict[str, object]] = [{"logprobs": True}, {"logprobs": 0}]
    for request in (chat(**named[0], logprob_token_ids=[7, 9]), *completions(**named[1], logprob_token_ids=[7, 9])):
        assert list(request.sampling.logprob_token_ids) == [7, 9] and request.sampling.HasField("logprobs")


def test_completion_logprobs_may_be_zero() -> None:
    (request,) = completions(logprobs=0)
    assert request.sampling.HasField("logprobs")


def test_the_new_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).sampling.max_tokens == 9


@pytest.mark.parametrize(
    ("prompt", "texts", "ids"),
    [
        ("a", ["a"], []),
        (["a", "b"], ["a", "b"], []),
        ([1, 2], [], [[1, 2]]),
        ([[1], [2, 3]], [], [[1], [2, 3]]),
    ],
)
def test_a_prompt_has_four_shapes(prompt: object, texts: list[str], ids: list[list[int]]) -> None:
    requests = completions(prompt=prompt)
    assert [r.text for r in requests if r.HasField("text")] == texts
    assert [list(r.token_ids.ids) for r in requests if r.HasField("token_ids")] == ids
    assert len({r.request_id for r in requests}) == len(requests)


def test_text_parts_join_to_what_the_plain_string_gives() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(messages=[{"role": "user", "content": parts}]) == chat()


def test_a_refusal_is_what_the_assistant_said() -> None:
    """As answers of OpenAI have it, which clients send back."""
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}, {"type": "text", "text": " Ask."}]}
    assert chat(messages=[USER, said, USER]).chat.messages[1].content == "No. Ask."
    with pytest.raises(InvalidRequest, match="refusal"):
        chat(messages=[{"role": "assistant", "content": [{"type": "refusal", "refusal": None}]}])


@pytest.mark.parametrize(
    "nothing",
    [
        {"top_logprobs": 0},
        {"top_logprobs": 0, "logprobs": False},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False}},
    ],
)
def test_what_asks_for_nothing_needs_nothing(nothing: dict[str, Any]) -> None:
    assert chat(**nothing) == chat()


def test_messages_keep_role_name_and_order_and_an_assistant_may_say_nothing() -> None:
    messages = [{"role": "system", "content": "s"}, {**USER, "name": "Ann"}, {"role": "assistant", "content": None}]
    got = [(m.role, m.content, m.name) for m in chat(messages=messages).chat.messages]
    assert got == [("system", "s", ""), ("user", "hi", "Ann"), ("assistant", "", "")]
    assert chat(messages=[USER, {"role": "assistant", "tool_calls": []}]).chat.messages[1].content == ""


def test_template_options_reach_the_template() -> None:
    request = chat(messages=[USER, ASSISTANT], continue_final_message=True, chat_template_kwargs={"é": [1, None]})
    assert request.chat.continue_final_message and not request.chat.add_generation_prompt
    assert orjson.loads(request.chat.template_kwargs_json) == {"é": [1, None]}
    assert not chat(add_generation_prompt=False).chat.add_generation_prompt
    assert chat(chat_template="{{ x }}").chat.chat_template == "{{ x }}"
    assert not chat(chat_template="").chat.chat_template
    assert chat(cache_salt="s" * 1024).cache_salt == "s" * 1024


def test_the_fields_of_a_chat_win_over_its_template_options() -> None:
    """As in vLLM, where an option of the template is what the client may say of what has no field."""
    documents = [{"title": "T", "text": "words"}]
    kwargs = {"documents": [], "reasoning_effort": "high", "x": 1}
    request = chat(documents=documents, reasoning_effort="low", chat_template_kwargs=kwargs)
    expected = {"documents": documents, "reasoning_effort": "low", "enable_thinking": True, "x": 1}
    assert orjson.loads(request.chat.template_kwargs_json) == expected
    asked = chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
    assert orjson.loads(asked.chat.template_kwargs_json)["enable_thinking"] is True
    assert not orjson.loads(chat(reasoning_effort="none").chat.template_kwargs_json)["enable_thinking"]
    assert orjson.loads(chat(chat_template_kwargs=kwargs).chat.template_kwargs_json) == kwargs


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"truncate_prompt_tokens": 7}, {"truncate_prompt_tokens": 7}),
        ({"truncate_prompt_tokens": 2**63 - 1}, {"truncate_prompt_tokens": 2**32 - 1}),
        ({"truncate_prompt_tokens": -1}, {"truncate_to_fit": True}),
        ({"truncate_prompt_tokens": -1, "truncation_side": "left"}, {"truncate_to_fit": True}),
        ({"truncation_side": "right"}, {"keep_first_tokens": True}),
    ],
)
def test_how_a_prompt_is_cut_reaches_the_router_from_every_endpoint(
    fields: dict[str, object], expected: dict[str, object]
) -> None:
    response = parse_response(orjson.dumps({"input": "hi", **fields}))
    as_chat = to_chat_request(to_chat_body(response, response.input), "id")
    for request in (chat(**fields), *completions(**fields), as_chat):
        cut = {name: value for name, value in as_dict(request).items() if "trunc" in name or "keep" in name}
        assert cut == expected


def test_a_session_or_a_cache_key_or_else_the_user_keeps_requests_together() -> None:
    assert chat(user="u", prompt_cache_key="k", session_id="s").session_id == "s"
    assert chat(user="u", prompt_cache_key="k").session_id == "k"
    assert chat(user="u").session_id == completions(user="u")[0].session_id == "u"
    assert chat().session_id == ""


BOTH_WRONG: list[tuple[str, object]] = [
    ("model", 3), ("n", 0), ("n", 129), ("n", 1.5), ("n", True), ("n", "2"), ("stream", "yes"), ("stream", 1),
    ("stream_options", {"include_usage": True}), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "5"),
    ("max_tokens", 5.0), ("max_tokens", 2**32), ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"),
    ("temperature", True), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 1.1), ("repetition_penalty", 0),
    ("repetition_penalty", 1e300), ("presence_penalty", 2.5), ("frequency_penalty", -2.5), ("logit_bias", [1]),
    ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"4294967296": 1}), ("stop", ""),
    ("allowed_token_ids", []), ("allowed_token_ids", [-1]), ("bad_words", [""]), ("bad_words", "x"), ("bad_words", [1]),
    ("logprob_token_ids", [1]),
    ("stop", ["a", ""]), ("stop", ["a"] * 65), ("stop", 5), ("seed", 1.5), ("seed", 2**63), ("stop_token_ids", [-1]),
    ("ignore_eos", 1), ("cache_salt", ""), ("cache_salt", "x" * 1025), ("request_id", "a\nb"), ("request_id", ""),
    ("response_format", {"type": "json_schema"}), ("response_format", {"type": "xml"}),
    ("tools", [{"type": "function"}]), ("tool_choice", "required"),
    ("structured_outputs", {"regex": "a", "choice": ["b"]}), ("structured_outputs", {"guided": 1}),
    ("prompt_logprobs", -1), ("prompt_logprobs", 2**32), ("audio", {}), ("modalities", ["text", "audio"]),
    ("use_beam_search", 1), ("length_penalty", 10.5), ("length_penalty", "1"),
    ("suffix", "x"), ("chat_template", 1), ("watermarking", True),
    ("session_id", "x" * 1025), ("repetition_detection", {"min_pattern_size": 2}),
    ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("truncate_prompt_tokens", 2**63),
    ("truncate_prompt_tokens", 1.0), ("truncate_prompt_tokens", True), ("truncation_side", "middle"),
    ("return_tokens_as_token_ids", 1), ("documents", {"a": "b"}), ("documents", [{"title": 1}]), ("documents", ["x"]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BOTH_WRONG)
def test_a_wrong_or_unsupported_value_names_its_field(field: str, value: object) -> None:
    for ask in (chat, completions):
        with pytest.raises(InvalidRequest) as caught:
            ask(**{field: value})
        assert caught.value.param.split(".")[0].split("[")[0] == field
        assert field in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [USER, 3]}, "messages[1]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "messages[1].tool_calls[0].function"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 2**32}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"min_tokens": 3, "max_completion_tokens": 2, "max_tokens": 9}, "min_tokens"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_chat_names_the_place(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[0]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [[1], [-1]]}, "prompt[1]"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"use_beam_search": True, "max_tokens": 0, "echo": True}, "max_tokens"),
    ],
)
def test_a_wrong_completion_names_the_place(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completions(**fields)
    assert caught.value.param == param


def test_a_missing_field_is_called_required() -> None:
    with pytest.raises(InvalidRequest, match="`prompt` is required"):
        parse_body(CompletionBody, b"{}")


def test_values_that_ask_for_nothing_are_accepted_and_unknown_fields_are_named() -> None:
    harmless = {
        "response_format": {"type": "text"}, "tools": None, "tool_choice": "auto", "modalities": ["text"], "suffix": "",
        "use_beam_search": False, "length_penalty": None, "best_of": 1, "watermarking": False,
        "repetition_detection": None,
    }  # fmt: skip
    chat(**harmless)
    completions(**harmless)
    body = parse_body(ChatBody, orjson.dumps({"messages": [USER], "user": "u", "store": True, "metadata": {}}))
    assert sorted(ignored_fields(body)) == ["metadata", "store"]


def test_a_beam_search_reaches_the_router_and_what_says_how_to_draw_is_named() -> None:
    for body in ({"use_beam_search": True, "n": 4, "length_penalty": 0}, {"use_beam_search": True, "best_of": 1}):
        for request in (chat(**body), *completions(**body)):
            assert request.HasField("beam_search") and request.n == body.get("n", 1)
            assert request.beam_search.HasField("length_penalty") == ("length_penalty" in body)
    for request in (chat(length_penalty=2), *completions(use_beam_search=None), *completions(use_beam_search=False)):
        assert not request.HasField("beam_search")
    drawing = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0, "seed": 1}
    for fields, named in (
        ({**drawing, "use_beam_search": True, "length_penalty": 2}, set(drawing)),
        ({**drawing, "length_penalty": 2}, {"length_penalty"}),
    ):
        assert set(ignored_fields(parse_body(ChatBody, orjson.dumps({"messages": [USER], **fields})))) == named


def test_mistakes_never_quote_the_prompt() -> None:
    secret = "my secret"
    for fields in ({"messages": [{"role": "user", "content": [{"type": secret}]}]}, {"messages": secret}):
        with pytest.raises(InvalidRequest) as caught:
            chat(**fields)
        assert secret not in caught.value.message


@given(st.text(), st.data())
def test_text_offsets_are_character_positions_wherever_tokens_are_cut(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    offsets = TextOffsets().extend([TokenText(bytes=piece) for piece in pieces])
    for offset, start in zip(offsets, [0, *cuts], strict=True):
        assert offset == len(raw[:start].decode(errors="ignore"))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*ChatBody.model_fields, *CompletionBody.model_fields, "tools", "x"]), json_values)
def test_any_json_value_is_either_taken_or_an_invalid_request(field: str, value: object) -> None:
    """No value may end in an error of ours, such as a number that protobuf cannot hold."""
    for ask in (chat, completions):
        try:
            made = ask(**{field: value})
        except InvalidRequest as error:
            assert error.message and error.param
        else:
            for request in made if isinstance(made, list) else [made]:
                assert math.isfinite(request.sampling.repetition_penalty)
                request.SerializeToString()


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, 0),
        ({"priority": -3}, -3),
        ({"service_tier": "auto"}, 0),
        ({"service_tier": "default"}, 0),
        ({"service_tier": "flex"}, 10),
        ({"service_tier": "priority"}, -10),
        ({"service_tier": "flex", "priority": 2}, 2),
    ],
)
def test_a_priority_is_said_by_number_or_by_tier(fields: dict[str, Any], priority: int) -> None:
    assert chat(**fields).priority == priority
    assert [request.priority for request in completions(prompt=["a", "b"], **fields)] == [priority, priority]
