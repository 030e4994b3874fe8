"""Outputs that follow a grammar, token by token, in an engine: against a plain reference, and however they are made."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Run, make_engine, run_all
from gpu_runners import LIMITS, make_gpu_runner
from llguidance import LLMatcher
from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import InvalidRequest, Overloaded
from pagewire_core.grammar import Vocabulary
from pagewire_core.tokenizer import Tokenizer
from pagewire_engine.constraint import Constraints, Matching
from pagewire_engine.engine import Engine
from pagewire_engine.events import Failed, FirstTokens, Token
from pagewire_engine.sampler import SampleRow, sample
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.ngram_proposer import NgramProposer
from pagewire_engine.speculative.policy import Policy, Rates
from pagewire_engine.speculative.step_times import Counts
from tiny_models import VOCAB, make_model, reference_model

EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99},
                   "t": {"type": "string", "maxLength": 6}},
    "required": ["on", "n", "t"], "additionalProperties": False,
}  # fmt: skip
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_pattern": " "})
ABC = LLMatcher.grammar_from_regex("(abc|abd){2,30}x")
THINKING = {"reasoning": r"start[lazy]: /(?s:.*)#;/", "reasoning_end": 'start: "#;"'}
PROMPTS = [list(range(10, 40)), [7, 8, 9], list(range(100, 171)), [33] * 20]


class Always(Policy):
    """Every draft is tried, however fast this machine is today."""

    def choose(self, num_sequences: int, rates: Rates, limits: Counts) -> Counts:
        return limits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("constrained"), "llama")


@pytest.fixture(scope="module")
def constraints(llama: Path) -> Constraints:
    return Constraints(Vocabulary(llama, VOCAB, [EOS]))


def constrained(
    constraints: Constraints,
    prompt: list[int],
    answer: str = JSON,
    thinking: dict[str, Any] | None = None,
    **params: Any,
) -> Run:
    run = Run(prompt, constrained=True, eos_token_ids=frozenset({EOS}), **({"max_tokens": 80} | params))
    run.request.matchings = constraints.make_now(pb.Constraint(answer=answer, **(thinking or {})))
    return run


def text(path: Path, tokens: list[int]) -> str:
    return Tokenizer(path).decode(tokens, skip_special_tokens=True)


def ends_of(run: Run) -> list[Token]:
    return [event for event in run.events if isinstance(event, Token) and event.finish_reason]


@torch.inference_mode()
def reference(path: Path, prompt: list[int], answer: str, **params: Any) -> list[int]:
    """transformers' logits, a matcher that is asked anew for every token, and the plain sampler."""
    model, vocabulary, output = reference_model(path), Vocabulary(path, VOCAB, [EOS]), list[int]()
    sampling = SamplingParams(**({"temperature": 0.0} | params))
    while not output or output[-1] != EOS:
        matcher = vocabulary.compile(answer)
        assert matcher.consume_tokens(output) or not output
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint32)[None, : VOCAB // 32]
        tokens = [*prompt, *output]
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1:].float()
        output.append(sample(logits, [SampleRow(sampling, 0, tokens, len(prompt))], None, mask)[0].token)
    return output


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "seed": 4, "top_k": 5},
                                    {"presence_penalty": 0.7, "repetition_penalty": 1.3}])  # fmt: skip
def test_tokens_are_those_of_a_plain_masked_model(
    llama: Path, constraints: Constraints, params: dict[str, Any]
) -> None:
    """The text is valid, the end of the sequence follows at once, and no end was shown as a stop token."""
    for prompt in PROMPTS[:2]:
        run = constrained(constraints, prompt, **params)
        run_all(make_engine(llama), run)
        assert run.tokens() == reference(llama, prompt, JSON, **params)
        assert set(json.loads(text(llama, run.tokens()))) == {"on", "n", "t"}
        assert [(e.finish_reason, e.stop_token_id) for e in ends_of(run)] == [(pb.FINISH_REASON_STOP, None)]


def mixed(constraints: Constraints) -> list[Run]:
    return [
        constrained(constraints, PROMPTS[0], n=3, temperature=1.0, seed=5),
        Run(PROMPTS[1], max_tokens=50, temperature=0.8, seed=6),
        constrained(constraints, PROMPTS[2], ABC, temperature=1.0, seed=7, logprobs=2),
        constrained(constraints, PROMPTS[3], temperature=0.7, seed=8, frequency_penalty=0.4),
        constrained(constraints, PROMPTS[0], ABC, {**THINKING, "reasoning_tokens": 9}, temperature=1.0, seed=9),
    ]


def outputs(run: Run) -> list[list[int]]:
    return [run.tokens(choice) for choice in range(run.request.n)]


def guessing() -> NgramProposer:
    proposer = NgramProposer(SpeculativeConfig("ngram", 4, prompt_lookup_max=3, prompt_lookup_min=1), 256)
    proposer.policy = Always()
    return proposer


def test_company_preemption_speculation_and_the_gpu_step_change_no_token(llama: Path, constraints: Constraints) -> None:
    """Several choices, penalties, thoughts and free sequences, alone and together, however the engine makes them."""
    alone = mixed(constraints)
    for run in alone:
        run_all(make_engine(llama), run)
    expected = [outputs(run) for run in alone]
    assert all(json.loads(text(llama, tokens)) for tokens in (*expected[0], *expected[3]))
    small = make_engine(llama, kv_cache_memory_bytes=112_000)
    assert small.config.num_blocks < 20
    plain = make_engine(llama)
    speculative = Engine(plain.runner, plain.config, proposer=guessing())
    gpu = Engine(make_gpu_runner(llama, LIMITS), LIMITS)
    for engine in (make_engine(llama), small, speculative, gpu):
        runs = mixed(constraints)
        run_all(engine, *runs)
        assert [outputs(run) for run in runs] == expected
    assert small.counters.preemptions > 0
    assert speculative.counters.accepted_tokens > 0


def test_an_output_goes_on_after_any_part_of_it(llama: Path, constraints: Constraints) -> None:
    """As after the loss of its worker: in the thoughts, at their forced end, and in the answer."""
    thinking = {**THINKING, "reasoning_tokens": 9}
    whole = constrained(constraints, PROMPTS[0], JSON, thinking, temperature=1.0, seed=9)
    run_all(make_engine(llama), whole)
    tokens = whole.tokens()
    engine = make_engine(llama)
    for length in range(1, len(tokens) - 1, 3):
        rest = constrained(constraints, PROMPTS[0], JSON, thinking, temperature=1.0, seed=9)
        wanted = pb.Constraint(answer=JSON, **thinking)
        rest.request.matchings = constraints.make_now(wanted, [tokens[:length]])
        engine.resume(rest.request, [tokens[:length]])
        run_all(engine)
        assert rest.tokens() == tokens[length:]


def test_thoughts_end_after_their_budget_and_the_answer_follows(llama: Path, constraints: Constraints) -> None:
    for budget in (0, 1, 6, 20):
        thinking = {**THINKING, "reasoning_tokens": budget}
        run = constrained(constraints, PROMPTS[0], JSON, thinking, temperature=1.0, seed=1)
        run_all(make_engine(llama), run)
        thoughts, end, answer = text(llama, run.tokens()).partition("#;")
        assert end and json.loads(answer)
        assert len(run.tokens()) - 1 - len(Tokenizer(llama).encode(answer, False)) <= budget + 2
    free = constrained(constraints, PROMPTS[0], "", {**THINKING, "reasoning_tokens": 4}, max_tokens=30)
    run_all(make_engine(llama), free)
    assert "#;" in text(llama, free.tokens()[:6]), thoughts


def test_the_first_token_of_a_prefill_worker_follows_the_grammar(llama: Path, constraints: Constraints) -> None:
    run = Run(PROMPTS[0], prefill_only=True, n=4, temperature=1.0, seed=2, constrained=True)
    run.request.matchings = constraints.make_now(pb.Constraint(answer=JSON))
    engine = make_engine(llama)
    engine.submit(run.request)
    while engine.step():
        engine.check()
    [first] = [event for event in run.events if isinstance(event, FirstTokens)]
    assert [text(llama, [t.token]) for t in first.tokens] == ["{"] * 4
    engine.cancel(run.request)


def test_a_complete_text_ends_before_min_tokens_and_not_earlier_than_it_must(
    llama: Path, constraints: Constraints
) -> None:
    """At the minimum nothing but the end may come of `yes`: it comes; of `a+` there is always another a."""
    for regex, length in (("yes", 4), ("a+", 20)):
        answer = LLMatcher.grammar_from_regex(regex)
        run = constrained(constraints, PROMPTS[0], answer, min_tokens=20, max_tokens=20, logit_bias={EOS: 100.0})
        run_all(make_engine(llama), run)
        assert len(run.tokens()) == length


def test_a_grammar_that_fails_ends_its_request_and_no_other(llama: Path, constraints: Constraints) -> None:
    """Its states grow beyond their bound after some tokens, which no compiling can foresee."""
    hostile = LLMatcher.grammar_from_regex("(a|aa|aaa)*(b{1,1000}){1,50}")
    bad = constrained(constraints, PROMPTS[0], hostile, temperature=1.0, seed=1, max_tokens=200, logit_bias={
        i: 100.0 for i in Tokenizer(llama).encode("b", False)})  # fmt: skip
    good, free = constrained(constraints, PROMPTS[1]), Run(PROMPTS[3], max_tokens=60)
    engine = make_engine(llama)
    run_all(engine, bad, good, free)
    [failed] = [event for event in bad.events if isinstance(event, Failed)]
    assert isinstance(failed.error, InvalidRequest)
    assert "cannot be followed" in failed.error.message and "state" not in failed.error.message
    assert good.tokens() == reference(llama, PROMPTS[1], JSON)
    assert len(free.tokens()) == 60


WEARING = 'start: "b" /(x+x+y|x{1,30}){1,50}/'


def walk(matching: Matching, tokens: list[int]) -> int:
    """Makes an output with a mask before each token; how many of its tokens there are when it ends or fails."""
    mask = np.zeros(VOCAB // 32, np.uint32)
    for token in tokens:
        matching.fill(mask)
        if not matching.error:
            matching.extend([token])
    return len(matching.taken)


def test_an_output_that_uses_up_its_grammars_bounds_leaves_others_theirs(llama: Path) -> None:
    """Copies of a matcher share a lexer: all that followed the same grammar failed with their first token."""
    constraints, wanted = Constraints(Vocabulary(llama, VOCAB, [EOS])), pb.Constraint(answer=WEARING)
    short, long = (Tokenizer(llama).encode(text, False) for text in ("bxx", "b" + "x" * 99))
    beside = constraints.make_now(wanted).of(0)
    worn = constraints.make_now(wanted).of(0)
    assert 40 < walk(worn, long) < 99 and isinstance(worn.error, InvalidRequest)
    assert walk(beside, short) == walk(constraints.make_now(wanted).of(0), short) == 3


def test_what_many_outputs_see_of_a_grammar_together_is_not_too_much_for_the_next(llama: Path) -> None:
    """Each sees a few of its states, all together more than a matcher may have: then none could be followed."""
    constraints = Constraints(Vocabulary(llama, VOCAB, [EOS]))
    wanted = pb.Constraint(answer=LLMatcher.grammar_from_regex("[ab]*a[ab]{20}c"))
    a, b = Tokenizer(llama).encode("ab", False)
    rng = random.Random(1)
    for _ in range(160):
        assert walk(constraints.make_now(wanted).of(0), rng.choices([a, b], k=200)) == 200


def test_an_output_goes_on_elsewhere_as_far_as_where_it_was_made(llama: Path) -> None:
    """Replayed in one step it took more of the lexer than step by step, and failed; so did tokens that guesses gave."""
    constraints, wanted = Constraints(Vocabulary(llama, VOCAB, [EOS])), pb.Constraint(answer=WEARING)
    output = Tokenizer(llama).encode("b" + "x" * 40, False)
    matching = constraints.make_now(wanted, [output[:31]]).of(0)
    assert walk(matching, output[31:]) == len(output) and not matching.error
    matching.fill(np.zeros(VOCAB // 32, np.uint32), output[1:2] * 99)
    assert walk(matching, output[1:6]) == len(output) + 5 and not matching.error


def test_an_output_whose_grammar_takes_long_to_compile_again_is_resumed(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps do not wait for that, and the output of a request whose lexer others had used up failed."""
    monkeypatch.setattr("pagewire_engine.constraint._QUICK_S", -1.0)
    constraints, wanted = Constraints(Vocabulary(llama, VOCAB, [EOS])), pb.Constraint(answer=WEARING)
    short, long = (Tokenizer(llama).encode(text, False) for text in ("bxx", "b" + "x" * 99))
    beside, worn = (constraints.make_now(wanted).of(0) for _ in range(2))
    assert 40 < walk(worn, long) < 99 and isinstance(worn.error, Overloaded)
    assert walk(beside, short) < 3 and isinstance(beside.error, Overloaded)
    resumed = constraints.make_now(wanted, [[short[0]]]).of(0)
    assert walk(resumed, short[1:]) == 3 and not resumed.error
    again = constraints.make_now(wanted, [worn.taken]).of(0)
    walk(again, long[len(worn.taken) :])
    assert isinstance(again.error, InvalidRequest), "it has used up its own grammar"


class Counting(Vocabulary):
    compiled = 0

    def compile(self, grammar: str) -> LLMatcher:
        self.compiled += 1
        return super().compile(grammar)


def test_a_guess_that_may_not_come_wears_no_grammar(llama: Path) -> None:
    """It would be compiled again for every such guess, while all wait."""
    vocabulary = Counting(llama, VOCAB, [EOS])
    matching = Constraints(vocabulary).make_now(pb.Constraint(answer=ABC)).of(0)
    first, guessed = np.empty((2, vocabulary.num_words), np.uint32)
    matching.fill(first)
    bits = np.unpackbits(first.view(np.uint8), bitorder="little")
    may_not = int(np.flatnonzero(bits[:VOCAB] == 0)[0])
    matching.fill(guessed, [may_not])
    assert (guessed == 0xFFFFFFFF).all() and not matching.error
    assert vocabulary.compiled == 1


def test_a_request_whose_masks_take_too_long_ends_and_those_beside_it_go_on(
    llama: Path, constraints: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its masks takes 0.2 s of 0.5 s that a request has, and 2 ms for a token: it fails with its third."""
    clock = itertools.count(step=0.2)
    monkeypatch.setattr("pagewire_engine.constraint.time.thread_time", lambda: next(clock))
    engine = make_engine(llama)
    slow, beside = constrained(constraints, PROMPTS[3], ABC, temperature=1.0, seed=7), Run(PROMPTS[0])
    run_all(engine, slow, beside)
    tokens = [event for event in slow.events if isinstance(event, Token)]
    failed = slow.events[-1]
    assert len(tokens) == 2 and isinstance(failed, Failed)
    assert isinstance(failed.error, InvalidRequest) and "make it simpler" in failed.error.message
    assert len(beside.tokens()) == 12


def test_masks_of_guesses_are_not_on_the_account_of_the_request(
    llama: Path, constraints: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that was just cheap enough was too dear where four guesses a step had a mask each."""
    clock = itertools.count(step=0.4)
    monkeypatch.setattr("pagewire_engine.constraint.time.thread_time", lambda: next(clock))
    monkeypatch.setattr("pagewire_engine.constraint._FREE_PER_TOKEN_S", 0.5)
    plain = make_engine(llama)
    for engine in (plain, Engine(plain.runner, plain.config, proposer=guessing())):
        run = constrained(constraints, PROMPTS[3], ABC, temperature=1.0, seed=7)
        run_all(engine, run)
        assert ends_of(run)
    assert engine.counters.draft_tokens > 8


def test_a_matcher_refuses_what_its_vocabulary_does_not_have(constraints: Constraints) -> None:
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        constraints.make_now(pb.Constraint(answer='start: nothing "a"'))


def test_what_is_compiled_for_one_tenant_is_compiled_again_for_another(llama: Path) -> None:
    """They have other cache roots. The time that a known grammar saves would tell who uses which."""
    vocabulary = Counting(llama, VOCAB, [EOS])
    constraints = Constraints(vocabulary)
    for root, expected in ((b"a", 1), (b"a", 1), (b"b", 2), (b"a", 2)):
        constraints.make_now(pb.Constraint(answer=ABC), root=root)
        assert vocabulary.compiled == expected
