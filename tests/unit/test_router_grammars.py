"""What clients ask of their output's form: compiled before admission, in processes that a hostile one may kill."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import tokenizers
from fakes import write_byte_tokenizer
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest, Overloaded
from pagewire_core.grammar import Vocabulary
from pagewire_core.tokenizer import Tokenizer
from pagewire_engine.constraint import Constraints
from pagewire_router.grammars import Grammars
from pagewire_router.structured_output import to_constraint
from router_scene import scene

EOS = 257
SPECIALS = {"<s>": 256, "</s>": 257}
pytestmark = pytest.mark.asyncio(loop_scope="module")

TAG = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags", "triggers": ["<f="],
        "tags": [
            {"begin": "<f=add>", "content": {"type": "json_schema", "json_schema": {"type": "integer"}}, "end": "</f>"},
            {"begin": "<f=say>", "content": {"type": "any_text"}, "end": "</f>"},
        ],
    },
}  # fmt: skip
OLD_TAG = {"structures": [{"begin": "<f=add>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f="]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grammars")
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def vocabulary(path: Path) -> Vocabulary:
    return Vocabulary(path, 258, [EOS])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grammars(path: Path) -> AsyncIterator[Grammars]:
    grammars = Grammars(path, 258, (EOS,))
    yield grammars
    await grammars.close()


def output(**fields: Any) -> inference_pb2.StructuredOutput:
    if isinstance(fields.get("choice"), list):
        fields["choice"] = inference_pb2.Texts(texts=fields["choice"])
    for name in ("json_schema", "structural_tag"):
        if not isinstance(fields.get(name, ""), str):
            fields[name] = json.dumps(fields[name])
    return inference_pb2.StructuredOutput(**fields)


def takes(vocabulary: Vocabulary, path: Path, grammar: str, text: str) -> bool:
    """Whether `text` is complete in this grammar."""
    matcher = vocabulary.compile(grammar)
    tokens = Tokenizer(path).encode(text, False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(("wanted", "right", "wrong"), [
    ({"json_object": True}, ['{"a": [1, {"b": null}]}', "{}", '{\n  "a": 1\n}'], ["[1]", "1", '{"a":  1}', "{} "]),
    ({"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                      "additionalProperties": False}},
     ['{"a": 1}', '{"a":1}', '{\n    "a": -3\n}'], ['{"a": "x"}', "{}", '{"a": 1, "b": 2}', '{"a": 1' + " " * 9 + "}"]),
    ({"json_schema": True}, ["1", "null", '["a"]'], ["a"]),
    ({"json_schema": {"type": "string", "format": "password"}}, ['"x"'], ["x"]),
    ({"json_schema": {"type": "object", "properties": {"format": {"const": {"format": "odd"}}}, "required": ["format"],
                      "additionalProperties": False}},
     ['{"format": {"format": "odd"}}'], ['{"format": {}}']),
    ({"json_object": True, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
    ({"json_object": True, "whitespace_pattern": "[ ]{2}"}, ['{  "a":  1}'], ['{"a": 1}']),
    ({"json_schema": {"type": "object", "x-guidance": {"whitespace_flexible": True}}}, ["{}"], ["{   }"]),
    ({"regex": r"^[a-z]+/\d{2}$"}, ["abc/12"], ["abc/1", "abc/123"]),
    ({"choice": ["yes", "no", 'é "q" \\ \n']}, ["yes", "no", 'é "q" \\ \n'], ["yesno", ""]),
    ({"grammar": 'start: "a" b\nb: /[0-9]+/'}, ["a12"], ["a"]),
    ({"grammar": 'root ::= "SELECT " col " from " [a-z]+\ncol ::= "x" | "y"'}, ["SELECT x from abc"], ["SELECT z"]),
    ({"structural_tag": TAG}, ["hi", "", "a <f=add>12</f> b <f=say>x <y</f>", "a < f"],
     ["a <f=add>x</f>", "<f=sub>", "<f=add>1"]),
    ({"structural_tag": OLD_TAG}, ["hi", "a <f=add>12</f> b"], ["<f=add>x</f>", "<f=no>"]),
    ({"structural_tag": {"format": TAG["format"] | {"at_least_one": True, "stop_after_first": True}}},
     ["<f=add>12</f>"], ["", "a <f=add>12</f>", "<f=add>12</f> b"]),
    ({"structural_tag": {"format": {"type": "sequence", "elements": [
        {"type": "const_string", "value": "x="}, {"type": "regex", "pattern": "[0-9]/[0-9]"},
        {"type": "or", "elements": [{"type": "grammar", "grammar": 'root ::= "!" | "?"'},
                                    {"type": "tag", "begin": "(", "content": {"type": "any_text"}, "end": ")"}]}]}}},
     ["x=1/2!", "x=1/2(a(b)"], ["x=1/2", "x=1/2(a)b"]),
    ({"structural_tag": {"format": {"type": "tags_with_separator", "separator": ",", "at_least_one": True, "tags": [
        {"begin": "<", "content": {"type": "json_schema", "json_schema": {"type": "boolean"}}, "end": ">"}]}}},
     ["<true>", "<true>,<false>"], ["", "<true>,", "<true><true>"]),
])  # fmt: skip
async def test_forms_take_what_they_should(
    path: Path, vocabulary: Vocabulary, wanted: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    grammar = to_constraint(output(**wanted), None, SPECIALS).answer
    assert [text for text in right if not takes(vocabulary, path, grammar, text)] == []
    assert [text for text in wrong if takes(vocabulary, path, grammar, text)] == []


async def test_tokens_that_stand_for_no_text_are_meant_by_their_names(path: Path, vocabulary: Vocabulary) -> None:
    tag = {"type": "tag", "begin": "<s>{", "content": {"type": "regex", "pattern": "a+"}, "end": "}<s>"}
    grammar = to_constraint(output(structural_tag={"format": tag}), None, SPECIALS).answer
    assert takes(vocabulary, path, grammar, "<s>{aa}<s>")  # the tokenizer makes the tokens of them
    matcher = vocabulary.compile(grammar)
    assert not matcher.try_consume_tokens(Tokenizer(path).encode("<", False))


SIZES = [{"type": "string", "pattern": f"^[a-z]{{{i},{i + 50}}}$"} for i in range(100)]
LARGE = {"anyOf": [{"type": "object", "properties": {f"p{j}": size for j in range(10)}} for size in SIZES]}
HOSTILE = [
    {"json_schema": "{"}, {"json_schema": "3"}, {"json_schema": {"type": "strin"}}, {"json_schema": "[" * 100_000},
    {"json_schema": {"type": "object", "not": {}}}, {"json_schema": {"$ref": "http://127.0.0.1:1/x"}},
    {"json_schema": {"enum": []}}, {"json_schema": {"type": "integer", "multipleOf": 99_991}},
    {"json_schema": {"type": "integer", "multipleOf": True}},
    {"json_schema": {"type": "string", "pattern": "(?=a)b"}},
    {"json_schema": '{"a":' * 3000 + "1" + "}" * 3000},
    {"regex": "("}, {"regex": r"\bx"}, {"choice": []}, {},
    {"grammar": "what is this"}, {"grammar": 'start: a\na: b\n'}, {"grammar": "start: " + "(" * 50_000},
    {"grammar": "root ::= " + "(" * 50_000}, {"grammar": 'start: "a" start'},
    {"grammar": "start: /[^\\x00-\\U0010FFFF]/"}, {"json_schema": LARGE},
    {"structural_tag": {"format": {"type": "odd"}}}, {"structural_tag": {"structures": [], "triggers": []}},
    {"structural_tag": {"format": TAG["format"] | {"triggers": ["<g="]}}}, {"structural_tag": "[]"},
]  # fmt: skip


@pytest.mark.parametrize("wanted", HOSTILE, ids=lambda w: str(w)[:40])
async def test_what_has_no_grammar_is_refused_in_a_sentence(grammars: Grammars, wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await grammars.constraint(output(**wanted), None)
    assert 10 < len(caught.value.message) < 600 and "\n" not in caught.value.message


async def test_a_grammar_that_kills_its_compiler_costs_nobody_else(grammars: Grammars) -> None:
    """Twenty bytes that take all the time there is: the loop goes on, others have theirs, and it is not tried again.

    On a fast machine the library's own bound on expressions may come first.
    """
    hostile = output(regex="(a{1000}){1000}")
    asked = [asyncio.create_task(grammars.constraint(hostile, None)) for _ in range(3)]
    others = 0
    while not all(task.done() for task in asked):
        assert (await grammars.constraint(output(regex=f"b{{{others + 1}}}"), None)).answer
        await asyncio.sleep(0.05)
        others += 1
    assert others > 3
    for task in asked:
        assert re.search("too much time or memory|too many expressions", str(task.exception()))
    checkers = list(grammars._processes._idle)
    with pytest.raises(InvalidRequest, match=r"too (much|many)"):  # known: no process dies of it again
        await grammars.constraint(hostile, None)
    assert grammars._processes._idle == checkers
    assert (await grammars.constraint(output(regex="c"), None)).answer


async def test_equal_grammars_are_compiled_once_and_too_many_wait_not_at_all(path: Path) -> None:
    grammars = Grammars(path, 258, (EOS,))
    same = [grammars.constraint(output(regex="a+"), None) for _ in range(50)]
    assert len({c.answer for c in await asyncio.gather(*same)}) == 1
    many = [grammars.constraint(output(regex=f"a{{{i}}}"), None) for i in range(1, 90)]
    results = await asyncio.gather(*many, return_exceptions=True)
    assert sum(isinstance(r, Overloaded) for r in results) == 89 - 64
    assert sum(isinstance(r, common_pb2.Constraint) for r in results) == 64
    with pytest.raises(InvalidRequest, match="KiB at most"):
        await grammars.constraint(output(regex="a" * 600_000), None)
    await grammars.close()


async def test_a_grammar_that_is_known_to_one_tenant_is_new_for_another(path: Path) -> None:
    """Compiling takes its time, which would tell whether others use the same schema."""
    grammars, wanted = Grammars(path, 258, (EOS,)), output(regex="secret+")
    found = [await grammars.constraint(wanted, None, tenant) for tenant in ("a", "a", "b")]
    assert len(grammars._known) == 2 and found[0].answer == found[2].answer
    together = [grammars.constraint(output(regex="b+"), None, tenant) for tenant in "aabb"]
    working = asyncio.gather(*together)
    await asyncio.sleep(0)
    assert len(grammars._running) == 2
    await working
    await grammars.close()


async def test_only_workers_that_can_follow_a_grammar_get_it(path: Path) -> None:
    """Those of an older version would ignore it without a word."""
    async with scene(Tokenizer(path), "p1 d1 p2 d2") as s:
        for worker in s.router.services.workers.live:
            worker.info.constraints = worker.worker_id in ("p2", "d2")
        for _ in range(6):
            await s.ask(structured_output=output(regex="a+"), sampling={"ignore_eos": True})
        assert not s.workers["p1"].requests and not s.workers["d1"].requests
        asked = [r.sampling for r in s.workers["d2"].requests if hasattr(r, "sampling")]
        assert len(asked) == 6 and all("a+" in sampling.constraint.answer for sampling in asked)
        assert not any(sampling.ignore_eos for sampling in asked)
        await s.ask(sampling={"constraint": common_pb2.Constraint(answer="start: /x/")})
        made = [r.sampling for w in s.workers.values() for r in w.requests if hasattr(r, "sampling")]
        assert not any("/x/" in sampling.constraint.answer for sampling in made)  # it is the router's to fill in


@pytest.mark.parametrize("marks", ["text", "tokens"])
@pytest.mark.parametrize("begin", ["<think>", ""])
async def test_thoughts_end_after_their_budget_whatever_their_marks_are(tmp_path: Path, marks: str, begin: str) -> None:
    """begin is empty where the prompt has begun them. Then comes the answer, and then the end."""
    write_byte_tokenizer(tmp_path)
    if marks == "tokens":
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokenizer.add_special_tokens(["<think>", "</think>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Tokenizer(tmp_path)
    vocabulary, output_ids = Vocabulary(tmp_path, text.vocab_size, [EOS]), list[int]()
    reasoning = inference_pb2.Reasoning(begin=begin, end="</think>", max_tokens=10)
    constraint = to_constraint(output(regex="yes|no"), reasoning, text.special_tokens)
    matching = Constraints(vocabulary).make_now(constraint).of(0)
    mask = np.zeros(vocabulary.num_words, np.uint32)
    while output_ids[-1:] != [EOS]:
        matching.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        forced = len(allowed) < 9
        assert forced or EOS not in allowed
        output_ids.append(allowed[0] if forced else text.encode("h", False)[0])
        matching.extend(output_ids[-1:])
    num_begin = len(text.encode(begin, False))
    said = text.decode(output_ids[:-1], skip_special_tokens=False)
    assert said == begin + "h" * (10 - num_begin) + "</think>no"
