"""Tokens that may not come, penalties over a window, log probabilities of named tokens: against a plain reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Run, make_engine, run_all
from gpu_runners import LIMITS, make_gpu_runner
from llguidance import LLMatcher
from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import InvalidRequest
from pagewire_core.grammar import Vocabulary
from pagewire_core.tokenizer import Tokenizer
from pagewire_engine.constraint import Constraints
from pagewire_engine.continued import Continued
from pagewire_engine.engine import Engine
from pagewire_engine.events import FirstTokens, Token
from pagewire_engine.masks import allowed_tokens
from pagewire_engine.sampler import SampleRow, sample
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.ngram_proposer import NgramProposer
from tiny_models import VOCAB, make_model, reference_model

EOS = 2
PROMPTS = [list(range(10, 40)), [7, 8, 9], list(range(100, 171)), [33] * 20]
SOME = frozenset(range(0, VOCAB, 7))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("masked"), "llama")


def may_come(params: SamplingParams, output: list[int]) -> list[bool]:
    """As the field's names say it, token by token."""
    allowed = [not params.allowed_token_ids or token in params.allowed_token_ids for token in range(VOCAB)]
    for *before, last in params.bad_tokens:
        if output[len(output) - len(before) :] == before:
            allowed[last] = False
    return allowed


@torch.inference_mode()
def reference(path: Path, prompt: list[int], **options: Any) -> list[int]:
    """transformers' logits, a mask made from scratch, and the plain sampler."""
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 12} | options))
    model, output = reference_model(path), list[int]()
    while len(output) < params.max_tokens:
        tokens = [*prompt, *output]
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1:].float()
        mask = np.packbits(may_come(params, output), bitorder="little").view(np.uint32)[None]
        output.append(sample(logits, [SampleRow(params, 0, tokens, len(prompt))], None, mask)[0].token)
    return output


def unmasked(path: Path, prompt: list[int], **options: Any) -> list[int]:
    run = Run(prompt, **options)
    run_all(make_engine(path), run)
    return run.tokens()


def masked(path: Path) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts, and what each may not write: some of it is what it would have written."""
    plain = [unmasked(path, prompt) for prompt in PROMPTS]
    cases: list[tuple[list[int], dict[str, Any]]] = [
        (PROMPTS[0], {"allowed_token_ids": SOME}),
        (PROMPTS[1], {"allowed_token_ids": SOME, "temperature": 0.9, "seed": 5, "top_k": 9}),
        (PROMPTS[1], {"bad_tokens": ((plain[1][0],), tuple(plain[1][1:3]), tuple(plain[1][2:5]))}),
        (PROMPTS[2], {"bad_tokens": ((plain[2][0], plain[2][1]), (plain[2][0],) * 3), "frequency_penalty": 0.3}),
        (PROMPTS[3], {"bad_tokens": ((plain[3][3],),), "temperature": 1.0, "seed": 6, "logprobs": 2}),
        (PROMPTS[1], {"repetition_penalty": 2.0, "presence_penalty": 2.0, "penalty_window": 4}),
    ]
    return [(prompt, {"max_tokens": 60, **params}) for prompt, params in cases]


def test_tokens_are_those_of_a_plain_masked_model_however_they_are_made(llama: Path) -> None:
    """Alone, together, preempted, beside free sequences, with guesses, and by the step of a GPU."""
    cases = masked(llama)
    expected = [reference(llama, prompt, **params) for prompt, params in cases]
    for tokens, (prompt, params) in zip(expected, cases, strict=True):
        free = {name: value for name, value in params.items() if name not in ("allowed_token_ids", "bad_tokens")}
        free.pop("penalty_window", None)
        assert tokens != unmasked(llama, prompt, **free), params
    small, plain = make_engine(llama, kv_cache_memory_bytes=112_000), make_engine(llama)
    proposer = NgramProposer(SpeculativeConfig("ngram", 4, prompt_lookup_max=2, prompt_lookup_min=1), 256)
    engines = {
        "plain": plain,
        "small": small,
        "speculative": Engine(plain.runner, plain.config, proposer=proposer),
        "gpu": Engine(make_gpu_runner(llama, LIMITS), LIMITS),
    }
    for name, engine in engines.items():
        runs, free = [Run(prompt, **params) for prompt, params in cases], Run(PROMPTS[0][::-1], max_tokens=60)
        run_all(engine, *runs, free)
        assert [run.tokens() for run in runs] == expected, name
        assert free.tokens() == unmasked(llama, PROMPTS[0][::-1], max_tokens=60)
    assert small.counters.preemptions > 0


def test_an_output_goes_on_in_the_middle_of_what_it_may_not_write(llama: Path) -> None:
    """As after the loss of its worker: bans look at the output, wherever it was made."""
    prompt, params = masked(llama)[2]
    whole, engine = reference(llama, prompt, **params), make_engine(llama)
    for length in range(1, len(whole), 7):
        rest = Run(prompt, **params)
        engine.resume(rest.request, [whole[:length]])
        run_all(engine)
        assert rest.tokens() == whole[length:]


def test_the_first_token_of_a_prefill_worker_is_masked(llama: Path) -> None:
    run = Run(PROMPTS[0], prefill_only=True, n=3, temperature=1.0, allowed_token_ids=frozenset({71}))
    engine = make_engine(llama)
    engine.submit(run.request)
    while engine.step():
        engine.check()
    [first] = [event for event in run.events if isinstance(event, FirstTokens)]
    assert [t.token for t in first.tokens] == [71] * 3
    engine.cancel(run.request)


def test_a_ban_that_would_leave_nothing_is_lifted(llama: Path) -> None:
    """min_tokens gives way to allowed_token_ids, both to a grammar: `ab` can be written, whatever else is asked."""
    ends = {"eos_token_ids": frozenset({EOS}), "min_tokens": 5}
    only_end = Run(PROMPTS[0], allowed_token_ids=frozenset({EOS}), **ends)
    run_all(make_engine(llama), only_end)
    assert only_end.tokens() == [EOS]
    grammar = LLMatcher.grammar_from_regex("ab")
    constraints = Constraints(Vocabulary(llama, VOCAB, [EOS]))
    run = Run(PROMPTS[0], constrained=True, allowed_token_ids=frozenset({70}), **ends)
    run.request.matchings = constraints.make_now(pb.Constraint(answer=grammar))
    run_all(make_engine(llama), run)
    assert run.tokens()[-1] == EOS and len(run.tokens()) <= 3


def test_a_grammar_is_followed_without_the_words_that_are_bad(llama: Path) -> None:
    constraints = Constraints(Vocabulary(llama, VOCAB, [EOS]))
    grammar = LLMatcher.grammar_from_regex("[ab]{12}")
    of_a = frozenset(Tokenizer(llama).encode("a", False))
    run = Run(PROMPTS[0], constrained=True, eos_token_ids=frozenset({EOS}), max_tokens=30, temperature=1.0, seed=1,
              bad_tokens=tuple((token,) for token in of_a))  # fmt: skip
    run.request.matchings = constraints.make_now(pb.Constraint(answer=grammar))
    run_all(make_engine(llama), run)
    assert not of_a & set(run.tokens()) and run.tokens()[-1] == EOS


def test_guesses_are_part_of_what_is_written() -> None:
    """Of a draft each row has a mask of its own, and the prompt's tokens are never the beginning of a bad word."""
    params = SamplingParams(bad_tokens=((5, 6), (6, 7, 8)))
    rows = [
        SampleRow(params, 0, [5], 1),
        SampleRow(params, 0, [5, 5], 1),
        SampleRow(params, 0, Continued([5, 6], [7]), 1),
        SampleRow(SamplingParams(), 0, [5, 6, 7], 0),
    ]
    bits = np.unpackbits(allowed_tokens(rows, 64).view(np.uint8), axis=1, bitorder="little")
    assert [np.flatnonzero(row == 0).tolist() for row in bits] == [[], [6], [8], []]


def test_bad_words_that_leave_nothing_take_nothing_out() -> None:
    """Whatever the size of the vocabulary: the bits beyond it are no tokens that are left."""
    for size in (96, 100):
        params = SamplingParams(bad_tokens=tuple((token,) for token in range(size)))
        [row] = allowed_tokens([SampleRow(params, 0, [5], 1)], size).view(np.uint8)
        assert np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist() == list(range(size))


@torch.inference_mode()
def test_log_probabilities_of_named_tokens_are_the_models_own(llama: Path) -> None:
    """Best first, whatever masks and penalties do; the same from the step of a GPU."""
    named = (300, 3, 71, 70)
    params = {"logprobs": 0, "logprob_token_ids": named, "allowed_token_ids": SOME, "max_tokens": 4}
    told = []
    for engine in (make_engine(llama), Engine(make_gpu_runner(llama, LIMITS), LIMITS)):
        run, other = Run(PROMPTS[0], **params), Run(PROMPTS[1], logprobs=1)  # type: ignore[arg-type]
        run_all(engine, run, other)
        tokens = [e.sampled for e in run.events if isinstance(e, Token)]
        output = [t.token for t in tokens]
        logits = reference_model(llama)(torch.tensor([[*PROMPTS[0], *output]]), use_cache=False).logits[0]
        raw = torch.log_softmax(logits[len(PROMPTS[0]) - 1 : -1].float(), -1)
        for sampled, row in zip(tokens, raw, strict=True):
            assert [i for i, _ in sampled.top] == sorted(named, key=lambda i, row=row: -row[i])  # type: ignore[misc]
            assert [value for _, value in sampled.top] == pytest.approx(
                [row[i].item() for i, _ in sampled.top], abs=1e-3
            )
        assert all(len(e.sampled.top) == 1 for e in other.events if isinstance(e, Token))
        told.append(output)
    assert told[0] == told[1]


def test_ids_that_are_no_tokens_are_refused(llama: Path) -> None:
    engine = make_engine(llama)
    for params in ({"allowed_token_ids": frozenset({VOCAB})}, {"bad_tokens": ((1, VOCAB),)},
                   {"logprobs": 0, "logprob_token_ids": (VOCAB,)}):  # fmt: skip
        with pytest.raises(InvalidRequest):
            engine.submit(Run(PROMPTS[0], **params).request)  # type: ignore[arg-type]


def test_a_token_that_is_named_twice_is_told_once() -> None:
    named = pb.SamplingParams(logprobs=0, logprob_token_ids=[7, 3, 7])
    assert SamplingParams.from_proto(named).logprob_token_ids == (7, 3)
