"""GpuRunner alone, on CPU tensors: batches by hand, against TorchRunner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_runners import LIMITS, make_gpu_runner, make_torch_runner
from pagewire_engine.gpu.decode_step import graph_sizes
from pagewire_engine.gpu.runner import GpuRunner
from pagewire_engine.model_runner import Runner
from pagewire_engine.sampler import Sampled
from scripted_batches import Script, Scripted
from tiny_models import ARCHITECTURES, VOCAB, make_model

LENGTHS = [1, 5, 16, 17, 33, 40]


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def prompts(script: Script, lengths: list[int] = LENGTHS, **params: Any) -> list[Scripted]:
    rng = np.random.default_rng(len(lengths))
    return [script.add(rng.integers(5, VOCAB, length).tolist(), seed=i, **params) for i, length in enumerate(lengths)]


def play(runner: Runner, steps: int = 8, **params: Any) -> list[Sampled]:
    """Sequences that join two at a time, with chunks cut anywhere, while others decode; then all decode."""
    script = Script()
    chosen: list[Sampled] = []
    running: list[Scripted] = []
    for turn, newcomer in enumerate(prompts(script, **params)):
        first = min(len(newcomer.tokens), 3 + 7 * turn)
        for count in filter(None, (first, len(newcomer.tokens) - first)):
            chosen += _step(runner, script, [*((seq, 1) for seq in running), (newcomer, count)])
        running.append(newcomer)
    for turn in range(steps):
        chosen += _step(runner, script, [(seq, 1) for seq in running[turn % 4 :]])
    return chosen


def _step(runner: Runner, script: Script, rows: list[tuple[Scripted, int]]) -> list[Sampled]:
    sampled = runner.launch(script.batch(*rows)).tokens()
    ended = [seq for seq, _ in rows if seq.num_computed == len(seq.tokens)]
    for seq, choice in zip(ended, sampled, strict=True):
        seq.tokens.append(choice.token)
    return sampled


def same(ours: list[Sampled], theirs: list[Sampled]) -> None:
    assert [each.token for each in ours] == [each.token for each in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.logprob == pytest.approx(their.logprob, abs=1e-4)
        assert [token for token, _ in our.top] == [token for token, _ in their.top]
        assert [value for _, value in our.top] == pytest.approx([value for _, value in their.top], abs=1e-4)


def test_every_architecture_chooses_what_the_torch_runner_chooses(model: Path) -> None:
    same(play(make_gpu_runner(model), logprobs=3), play(make_torch_runner(model), logprobs=3))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.7, "logprobs": 0},
        {"temperature": 1.0, "min_p": 0.05, "top_k": 50, "top_p": 0.9},
        {"temperature": 0.7, "repetition_penalty": 1.3, "logprobs": 2},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"min_tokens": 40, "eos_token_ids": frozenset(range(0, 300, 2)), "logit_bias": {7: 4.0}},
    ],
    ids=lambda params: "-".join(params),
)
def test_every_way_of_sampling_chooses_what_the_torch_runner_chooses(llama: Path, params: dict[str, Any]) -> None:
    same(play(make_gpu_runner(llama), **params), play(make_torch_runner(llama), **params))


def test_tokens_of_the_step_before_need_not_be_known(llama: Path) -> None:
    """The engine launches a step before it has read the one before: input ids say which token is meant."""
    expected = play(make_gpu_runner(llama), steps=0) and _decode_all(make_gpu_runner(llama), overlap=False)
    assert _decode_all(make_gpu_runner(llama), overlap=True) == expected


def _decode_all(runner: GpuRunner, *, overlap: bool, steps: int = 6) -> list[list[int]]:
    """Prompts one by one, then steps that decode all of them in an order that turns, one launched ahead."""
    script = Script()
    seqs = prompts(script, temperature=0.9)
    launched = None
    before: list[Scripted] = []
    for turn in range(-len(seqs), steps):
        if turn < 0:
            rows = [(seqs[turn], len(seqs[turn].tokens))]
            unknown: dict[Scripted, int] = {}
        else:
            order = seqs[turn % 5 :] + seqs[: turn % 5]
            rows = [(seq, 1) for seq in order]
            unknown = {seq: before.index(seq) for seq in order if launched and seq in before}
        batch = script.batch(*rows, unknown=unknown)
        following = runner.launch(batch)
        if launched:
            _append(before, launched.tokens())
        launched, before = following, [seq for seq, _ in rows]
        if not overlap:
            _append(before, launched.tokens())
            launched = None
    if launched:
        _append(before, launched.tokens())
    return [seq.tokens for seq in seqs]


def _append(seqs: list[Scripted], sampled: list[Sampled]) -> None:
    for seq, choice in zip(seqs, sampled, strict=True):
        seq.tokens.append(choice.token)


def test_padding_rows_write_nothing(llama: Path) -> None:
    """Three sequences run in a step of four rows. The pages they do not hold stay as they were: poison."""
    runner = make_gpu_runner(llama)
    script = Script()
    seqs = prompts(script, [4, 18, 2])
    for seq in seqs:
        _step(runner, script, [(seq, len(seq.tokens))])
    for _ in range(3):
        _step(runner, script, [(seq, 1) for seq in seqs])
    written = torch.zeros(LIMITS.num_blocks, 16, dtype=torch.bool)
    for seq in seqs:
        for position in range(seq.num_computed):
            written[seq.blocks[position // 16], position % 16] = True
    poisoned = runner.cache.kv.isnan()
    assert poisoned.all(-1).all(-1).eq(poisoned.any(-1).any(-1)).all()
    assert poisoned[:, :, :, :, 0, 0].eq(~written).all()


def test_more_sequences_than_graphs_were_made_for_decode_all_the_same(llama: Path) -> None:
    """Transferred sequences may exceed --max-num-seqs; so may the tables, which then grow to a new array."""
    small = LIMITS.__class__(**(LIMITS.__dict__ | {"max_num_seqs": 2}))
    same(play(make_gpu_runner(llama, small)), play(make_torch_runner(llama)))


def test_tables_that_grow_are_read_anew(llama: Path) -> None:
    runner, script = make_gpu_runner(llama), Script(seats=2)
    expected, other = make_torch_runner(llama), Script(seats=2)
    outcomes = []
    for each, book in ((runner, script), (expected, other)):
        seqs = prompts(book, [9, 20])
        chosen = [_step(each, book, [(seq, len(seq.tokens))]) for seq in seqs]
        book.tables = np.concatenate([book.tables, np.zeros_like(book.tables)])
        late = book.add([7] * 20)
        chosen.append(_step(each, book, [*((seq, 1) for seq in seqs), (late, 20)]))
        chosen.append(_step(each, book, [(seq, 1) for seq in (*seqs, late)]))
        outcomes.append(chosen)
    assert outcomes[0] == outcomes[1]


def test_a_step_that_chooses_nothing_is_still_a_step(llama: Path) -> None:
    runner, script = make_gpu_runner(llama), Script()
    seq = script.add(range(20, 60))
    assert runner.launch(script.batch((seq, 25))).tokens() == []
    [first] = _step(runner, script, [(seq, 15)])
    assert first.token == play_whole(make_torch_runner(llama), list(range(20, 60)))


def play_whole(runner: Runner, tokens: list[int]) -> int:
    script = Script()
    [sampled] = _step(runner, script, [(script.add(tokens), len(tokens))])
    return sampled.token


def test_graph_sizes_are_vllms_and_end_at_the_limit() -> None:
    assert graph_sizes(128) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128]
    assert graph_sizes(1) == [1]
    assert graph_sizes(12) == [1, 2, 4, 8, 12]
    assert graph_sizes(300)[-4:] == [256, 272, 288, 300]
