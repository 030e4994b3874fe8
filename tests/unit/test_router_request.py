from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from fakes import DIGEST, TEMPLATE
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.chat_template import ChatTemplate
from pagewire_core.errors import ContextLength, InvalidRequest, ModelNotFound
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.model import ServedModel
from pagewire_router.request import ValidRequest, validate
from pagewire_router.sampling_defaults import SamplingDefaults

LIMIT = 100


@pytest.fixture
def model(byte_tokenizer: Tokenizer) -> ServedModel:
    template = ChatTemplate(TEMPLATE, "<s>", "</s>")
    return ServedModel(("demo", "alias"), "demo", DIGEST, LIMIT, 258, (257,), byte_tokenizer, template)


def ask(served: ServedModel, **fields: Any) -> ValidRequest:
    fields.setdefault("text", "hello")
    return validate(inference_pb2.GenerateRequest(**fields), served, LIMIT)


def chat(*messages: tuple[str, str], **fields: Any) -> inference_pb2.Chat:
    return inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role=r, content=c) for r, c in messages], **fields)


def test_what_is_not_said_is_filled_in(model: ServedModel) -> None:
    valid = ask(model)
    assert (valid.model, valid.n, len(valid.prompt_ids), valid.sampling.max_tokens) == ("demo", 1, 5, LIMIT - 5)
    assert valid.sampling.HasField("seed")
    assert list(valid.sampling.eos_token_ids) == [257]
    assert len(valid.request_id) == 32
    assert ask(model).sampling.seed != valid.sampling.seed


def test_max_tokens_default_to_the_context_for_chat_and_16_for_completions(model: ServedModel) -> None:
    assert ask(model, completion_default_length=True).sampling.max_tokens == 16
    assert ask(model, completion_default_length=True, text="x" * 95).sampling.max_tokens == 5
    assert ask(model, text="x" * 99).sampling.max_tokens == 1


def test_a_server_may_take_shorter_prompts_than_the_context_allows(model: ServedModel) -> None:
    short = dataclasses.replace(model, max_input_tokens=5)
    assert len(ask(short, text="x" * 5).prompt_ids) == 5
    assert len(ask(short, text="x" * 50, truncate_prompt_tokens=5).prompt_ids) == 5
    with pytest.raises(ContextLength, match="has 6 tokens; this server takes at most 5"):
        ask(short, text="x" * 6)


def test_max_tokens_are_clipped_to_the_context_where_that_is_asked_for(model: ServedModel) -> None:
    for asked, clipped in ((LIMIT, True), (LIMIT - 5, False), (3, False)):
        sampling = common_pb2.SamplingParams(max_tokens=asked)
        valid = ask(model, clip_max_tokens=True, sampling=sampling)
        assert valid.sampling.max_tokens == min(asked, LIMIT - 5) and valid.max_tokens_clipped == clipped
    short = dataclasses.replace(model, sampling_defaults=SamplingDefaults(most_tokens=7))  # not for the context's sake
    sampling = common_pb2.SamplingParams(max_tokens=LIMIT)
    valid = ask(short, clip_max_tokens=True, model_sampling_defaults=True, sampling=sampling)
    assert valid.sampling.max_tokens == 7 and not valid.max_tokens_clipped
    with pytest.raises(ContextLength):
        ask(model, text="x" * LIMIT, clip_max_tokens=True, sampling=sampling)


def test_a_prompt_is_cut_to_what_leaves_room(model: ServedModel) -> None:
    """vLLM's -1; the room is that of the answer, or of one token."""
    text = "".join(map(chr, range(33, 127))) * 2
    for asked, left in ((0, 1), (30, 30)):
        sampling = common_pb2.SamplingParams(max_tokens=asked)
        valid = ask(model, text=text, truncate_to_fit=True, sampling=sampling)
        assert model.tokenizer.decode(valid.prompt_ids, False) == text[-(LIMIT - left) :]
        assert valid.sampling.max_tokens == left
    assert len(ask(dataclasses.replace(model, max_input_tokens=5), text=text, truncate_to_fit=True).prompt_ids) == 5
    both = ask(model, text=text, truncate_to_fit=True, truncate_prompt_tokens=3)
    assert model.tokenizer.decode(both.prompt_ids, False) == text[-3:]
    with pytest.raises(ContextLength, match="101 were asked for"):
        ask(model, text=text, truncate_to_fit=True, sampling=common_pb2.SamplingParams(max_tokens=LIMIT + 1))


@pytest.mark.parametrize(("fields", "left"), [({}, "cde"), ({"keep_first_tokens": True}, "abc")])
def test_what_is_cut_is_not_echoed(model: ServedModel, fields: dict[str, Any], left: str) -> None:
    ids = inference_pb2.TokenIds(ids=model.tokenizer.encode("abcde", False))
    for prompt in ({"text": "abcde"}, {"token_ids": ids}):
        request = inference_pb2.GenerateRequest(**prompt, **fields, truncate_prompt_tokens=3, echo=True)
        valid = validate(request, model, LIMIT)
        assert valid.echo_text == model.tokenizer.decode(valid.prompt_ids, False) == left
        assert valid.prompt_tail == (left if "text" in prompt else "")
    assert ask(model, text="abc", truncate_prompt_tokens=3, echo=True, **fields).echo_text == "abc"


def test_a_text_that_is_to_be_cut_has_a_bound_too(model: ServedModel) -> None:
    for field in ({"truncate_to_fit": True}, {"truncate_prompt_tokens": 5}):
        with pytest.raises(ContextLength, match="at most 1048576 characters"):
            ask(model, text="x" * (1 << 20) + "x", **field)


def test_the_operator_says_how_many_log_probabilities_are_too_many(model: ServedModel) -> None:
    more, none = (dataclasses.replace(model, max_logprobs=number) for number in (50, 0))
    fields = {"sampling": common_pb2.SamplingParams(logprobs=50), "prompt_logprobs": 50}
    assert ask(more, **fields).sampling.logprobs == 50
    for served, name in ((model, "logprobs"), (model, "prompt_logprobs"), (none, "logprobs")):
        with pytest.raises(InvalidRequest, match=r"--max-logprobs") as caught:
            ask(served, **{key: value for key, value in fields.items() if (key == "sampling") == (name == "logprobs")})
        assert caught.value.param == name
    assert ask(none, sampling=common_pb2.SamplingParams(logprobs=0)).sampling.HasField("logprobs")


def test_a_chat_goes_through_the_template_without_a_second_bos(model: ServedModel) -> None:
    valid = validate(inference_pb2.GenerateRequest(chat=chat(("user", "hi"))), model, LIMIT)
    assert model.tokenizer.decode(valid.prompt_ids, False) == "<s><user>hi</s><assistant>"
    assert valid.prompt_ids.count(256) == 1


def test_a_final_message_can_be_continued(model: ServedModel) -> None:
    request = chat(("user", "hi"), ("assistant", "We"), continue_final_message=True)
    valid = validate(inference_pb2.GenerateRequest(chat=request), model, LIMIT)
    assert model.tokenizer.decode(valid.prompt_ids, False).endswith("<assistant>We")


def test_echo_is_the_prompts_text(model: ServedModel) -> None:
    assert ask(model).echo_text is None
    assert ask(model, echo=True).echo_text == "hello"
    ids = model.tokenizer.encode("abc", False)
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), echo=True)
    assert validate(request, model, LIMIT).echo_text == "abc"


def test_an_unknown_model_is_told_in_the_words_that_clients_know(model: ServedModel) -> None:
    assert ask(model, model="alias").model == "alias"
    with pytest.raises(ModelNotFound, match=r"^The model `gpt` does not exist\.$"):
        ask(model, model="gpt")


@pytest.mark.parametrize(("text", "max_tokens"), [("x" * 100, 0), ("x" * 90, 11), ("x" * 200, 1)])
def test_what_does_not_fit_is_refused_with_the_words_that_clients_look_for(
    model: ServedModel, text: str, max_tokens: int
) -> None:
    with pytest.raises(ContextLength, match="maximum context length is 100 tokens"):
        ask(model, text=text, sampling=common_pb2.SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.1),
        ("min_p", 1.5), ("min_p", -0.1), ("top_k", -2), ("repetition_penalty", 0.0), ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1), ("logprobs", 21), ("stop", [""]), ("stop", ["x"] * 65),
        ("stop_token_ids", [258]), ("logit_bias", {258: 1.0}), ("logit_bias", {1: 101.0}), ("min_tokens", 96),
        ("allowed_token_ids", [258]), ("logprob_token_ids", [258]), ("logprob_token_ids", [1] * 129),
        ("bad_words", [" "]), ("bad_words", ["x" * 257]), ("bad_words", ["x"] * 1025),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(model: ServedModel, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(model, sampling=common_pb2.SamplingParams(**{field: value}))
    assert caught.value.param == field
    assert field in caught.value.message or field == "stop"


def test_a_bad_word_is_banned_at_the_beginning_of_a_text_and_after_a_space(model: ServedModel) -> None:
    """The prompt's own words are not looked at, and nobody says in its stead how words are written."""
    theirs = [common_pb2.TokenSequence(ids=[1])]
    sampling = common_pb2.SamplingParams(bad_words=["no", " no", "é"], bad_tokens=theirs)
    found = [model.tokenizer.decode(list(s.ids), False) for s in ask(model, sampling=sampling).sampling.bad_tokens]
    assert found == ["no", " no", "é", " é"]


def test_values_at_the_edges_are_allowed(model: ServedModel) -> None:
    ask(model, sampling=common_pb2.SamplingParams(temperature=0, top_p=1, min_p=1, top_k=-1, logprobs=0, stop=["x"]))


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"token_ids": inference_pb2.TokenIds()},
        {"token_ids": inference_pb2.TokenIds(ids=[258])},
        {"chat": inference_pb2.Chat()},
        {"chat": chat(("", "hi"))},
        {"chat": chat(("user", "hi"), template_kwargs_json="[]")},
        {"chat": chat(("user", "hi"), template_kwargs_json="{")},
        {"chat": chat(("user", "hi"), template_kwargs_json='{"messages": 1}')},
        {"n": 129, "text": "x"},
        {},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(model: ServedModel, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        validate(inference_pb2.GenerateRequest(**fields), model, LIMIT)


REFUSED_IN_BEAM_SEARCH: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 11}), ("prompt_logprobs", {"prompt_logprobs": 0}), ("prompt_only", {"prompt_only": True}),
    ("structured_outputs", {"structured_output": inference_pb2.StructuredOutput(json_object=True)}),
    ("thinking_token_budget", {"reasoning": inference_pb2.Reasoning(begin="a", end="b", max_tokens=0)}),
    *(("length_penalty", {"beam_search": inference_pb2.BeamSearch(length_penalty=p)}) for p in (10.1, -11, math.nan)),
    *((name, {"sampling": common_pb2.SamplingParams(**{name: value})}) for name, value in {
        "stop": ["a"], "stop_token_ids": [1], "min_tokens": 1, "logit_bias": {1: 1.0}, "allowed_token_ids": [1],
        "bad_words": ["a"], "logprob_token_ids": [1], "presence_penalty": 0.1, "frequency_penalty": -1.0,
        "watermark": True, "repetition_penalty": 1.1, "typical_p": 0.5,
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), REFUSED_IN_BEAM_SEARCH)
def test_a_beam_search_refuses_what_it_cannot_honour(model: ServedModel, param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        ask(model, **{"beam_search": inference_pb2.BeamSearch(), "n": 10, **fields})
    assert caught.value.param == param


def test_a_beam_search_takes_no_default_of_sampling_but_the_length(model: ServedModel) -> None:
    """A model's own repetition penalty would be refused if a client asked for it."""
    served = dataclasses.replace(model, sampling_defaults=SamplingDefaults({"repetition_penalty": 1.3}, max_tokens=7))
    valid = ask(served, beam_search=inference_pb2.BeamSearch(), n=10, model_sampling_defaults=True)
    assert (valid.length_penalty, valid.n, valid.sampling.max_tokens) == (1.0, 10, 7)
    assert not valid.sampling.HasField("repetition_penalty")
    assert ask(served, beam_search=inference_pb2.BeamSearch(length_penalty=0)).length_penalty == 0
    assert ask(served).length_penalty is None


def test_a_model_without_template_says_what_to_do(model: ServedModel) -> None:
    with pytest.raises(InvalidRequest, match="--chat-template"):
        request = inference_pb2.GenerateRequest(chat=chat(("user", "hi")))
        validate(request, dataclasses.replace(model, chat_template=None), LIMIT)


def test_a_tenant_and_a_priority_are_passed_on(model: ServedModel) -> None:
    valid = ask(model, tenant="team-a", priority=-4)
    assert (valid.tenant, valid.priority) == ("team-a", -4)
    with pytest.raises(InvalidRequest, match="tenant must have at most 256"):
        ask(model, tenant="x" * 257)
