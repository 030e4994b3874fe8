"""The draft model's own KV: whatever the target made of the drafts, the next ones are the model's greedy tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runners import LIMITS, make_gpu_runner
from hash_model import VOCABULARY, HashRunner, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_core.block_hash import PageKeys
from pagewire_core.model_dir import resolve_model
from pagewire_engine.config import EngineConfig
from pagewire_engine.loader import load
from pagewire_engine.options import EngineOptions
from pagewire_engine.sampler import NO_TOKEN
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request, Sequence
from pagewire_engine.speculative.draft_model import DraftModel
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, make_model, reference_greedy


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("draft"), "llama")


def make_draft(path: Path, **options: Any) -> DraftModel:
    settings: dict[str, Any] = {
        "kv_cache_memory_bytes": 4 << 20, "max_num_batched_tokens": 512, "max_model_len": 256, "device": "cpu",
        "poison_free_blocks": True,
    }  # fmt: skip
    loaded = load(resolve_model(str(path)), EngineOptions(**(settings | options)))
    return DraftModel(loaded.runner, loaded.config)


def make_target(length: int, seed: int = 0) -> Sequence:
    rng = random.Random(seed)
    prompt = [rng.randrange(5, VOCAB) for _ in range(length)]
    request = Request("test", prompt, b"r" * 32, SamplingParams(max_tokens=1000), 1, lambda event: None)
    return Sequence(request, 0, list(prompt), length, PageKeys(request.cache_root, 16))


def assert_empty(model: DraftModel, *targets: Sequence) -> None:
    for seq in targets:
        model.cache.drop(seq)
    model.cache.check()
    assert model.cache.blocks.num_held == 0 and model.cache.seats.num_taken == 0


@settings(max_examples=150)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([4, 9, 40]),
    st.sampled_from([2, 8]),
    st.sampled_from([7, 20, 200]),
    st.randoms(use_true_random=False),
)
def test_any_mix_of_what_the_target_does_gives_greedy_drafts_or_none(
    lengths: list[int],
    overlaps: bool,
    caching: bool,
    num_blocks: int,
    num_seqs: int,
    num_batched: int,
    rng: random.Random,
) -> None:
    """Prompts in chunks, rejections, drafts that had no room, sequences that end and come, a pool that is too small."""
    config = EngineConfig(96, 16, num_blocks, num_seqs, num_batched, caching)
    model = DraftModel(HashRunner(num_blocks, 16, overlaps=overlaps), config)
    targets = [Sequence(_request(), 0, [t % 3 for t in range(n)], n, PageKeys(b"r" * 32, 16)) for n in lengths]
    for _ in range(15):
        wanted = [(seq, rng.randrange(1, 5)) for seq in targets if rng.random() < 0.8]
        drafts = model.draft(wanted)
        model.cache.check()
        for (seq, count), draft in zip(wanted, drafts, strict=True):
            greedy = expected(seq.tokens, SamplingParams(temperature=0.0, max_tokens=count), 0, 1000)
            assert draft == greedy[: len(draft)] and len(draft) in (0, min(count, 97 - len(seq.tokens)))
            kept = rng.randrange(len(draft) + 1)
            seq.tokens += draft[:kept] + [rng.randrange(VOCABULARY)] * rng.randrange(kept == 0, 2)
        if rng.random() < 0.2:
            model.cache.drop(rng.choice(targets))
    assert_empty(model, *targets)


def _request() -> Request:
    return Request("test", [], b"r" * 32, SamplingParams(max_tokens=1000), 1, lambda event: None)


@pytest.mark.parametrize("lengths", [(5,), (31, 7, 64, 100)])
def test_drafts_are_greedy_whatever_became_of_the_drafts_before(llama: Path, lengths: tuple[int, ...]) -> None:
    """All, some or none accepted, a token of the target's own behind, over several page ends; pages are poisoned."""
    model, rng = make_draft(llama), random.Random(1)
    targets = [make_target(length, length) for length in lengths]
    for step in range(10):
        wanted = [(seq, rng.randrange(1, 5)) for seq in targets if rng.random() < 0.9 or not step]
        drafts = model.draft(wanted)
        model.cache.check()
        for (seq, count), draft in zip(wanted, drafts, strict=True):
            assert draft == reference_greedy(llama, seq.tokens, count)[0]
            accepted = rng.randrange(count + 1)
            seq.tokens += [*draft[:accepted], rng.randrange(5, VOCAB)]
    assert_empty(model, *targets)


def test_the_gpu_runner_drafts_ahead_of_what_the_host_has_read(llama: Path) -> None:
    """It overlaps: each step takes its ids from the step before, on the device."""
    runner, rng = make_gpu_runner(llama), random.Random(1)
    assert runner.overlaps
    model, targets = DraftModel(runner, LIMITS), [make_target(7, 1), make_target(20, 2)]
    for _ in range(4):
        counts = [rng.randrange(1, 5) for _ in targets]
        drafts = model.draft(list(zip(targets, counts, strict=True)))
        for seq, count, draft in zip(targets, counts, drafts, strict=True):
            assert draft == reference_greedy(llama, seq.tokens, count)[0]
            seq.tokens += [*draft[: rng.randrange(count + 1)], rng.randrange(5, VOCAB)]
    assert_empty(model, *targets)


def test_drafts_that_the_engine_had_no_room_for_are_made_again(llama: Path) -> None:
    """The target went on by exactly what was drafted first: the draft model has all its tokens, and needs logits."""
    model, seq = make_draft(llama), make_target(20)
    [draft] = model.draft([(seq, 4)])
    seq.tokens.append(draft[0])
    assert model.draft([(seq, 3)]) == [reference_greedy(llama, seq.tokens, 3)[0]]
    assert_empty(model, seq)


def test_a_long_prompt_is_caught_up_with_over_several_steps(llama: Path) -> None:
    """A prompt computed at once would hold up every sequence that decodes."""
    model = make_draft(llama, max_model_len=512)
    long, short = make_target(400, 1), make_target(20, 2)
    assert model.draft([(long, 2), (short, 2)])[0] == []
    assert model.cache.settle(long).num_computed == 256
    assert all(model.draft([(short, 2)]))
    assert model.draft([(long, 2)]) == [reference_greedy(llama, long.tokens, 2)[0]]
    assert_empty(model, long, short)


def test_without_blocks_there_are_no_drafts_and_no_error(llama: Path) -> None:
    model = make_draft(llama, kv_cache_memory_bytes=4 * 16 * 384, max_model_len=64)  # 4 blocks
    first, second = make_target(40, 1), make_target(40, 2)
    drafts = model.draft([(first, 3), (second, 3)])
    assert [len(draft) for draft in drafts] == [3, 0]
    model.cache.drop(first)
    assert model.draft([(second, 3)]) == [reference_greedy(llama, second.tokens, 3)[0]]
    assert_empty(model, second)


def test_a_sequence_longer_than_the_draft_model_gets_fewer_drafts_and_then_none(llama: Path) -> None:
    model, seq = make_draft(llama, max_model_len=32), make_target(30)
    assert [len(draft) for draft in model.draft([(seq, 5)])] == [3]  # the third is sampled at position 31
    seq.tokens += [7, 8, 9]
    assert model.draft([(seq, 5)]) == [[]]
    assert_empty(model, seq)


def test_equal_prompts_are_computed_once(llama: Path) -> None:
    """The choices of one request, or the turns of one chat."""
    model, first, second = make_draft(llama), make_target(70), make_target(70)
    expected = reference_greedy(llama, first.tokens, 3)[0]
    assert model.draft([(first, 3)]) == [expected]
    model.draft([(first, 1)])  # what was drafted first is the target's by now, or not: the prompt is findable
    assert model.cache.settle(second).num_computed == 64
    assert model.draft([(second, 3)]) == [expected]
    assert_empty(model, first, second)


def hashed(num_blocks: int = 100, **limits: Any) -> tuple[DraftModel, HashRunner]:
    """A draft model whose steps can be looked at."""
    options = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 400} | limits
    runner = HashRunner(num_blocks, 16)
    return DraftModel(runner, EngineConfig(block_size=16, num_blocks=num_blocks, **options)), runner


def computed(runner: HashRunner) -> list[int]:
    """Tokens that each sequence computed in the first step since it was last asked."""
    counts = [count for _, count in runner.batches[0].scheduled]
    runner.batches.clear()
    return counts


def test_what_came_true_is_not_computed_again() -> None:
    """Of four drafts the last one's KV is missing, as nothing came after it."""
    model, runner = hashed()
    seq = make_target(20)
    [draft] = model.draft([(seq, 4)])
    assert computed(runner) == [20]
    seq.tokens += [*draft, 7]
    [draft] = model.draft([(seq, 4)])
    assert computed(runner) == [2]
    seq.tokens += [*draft[:2], draft[2] + 1]
    model.draft([(seq, 1)])
    assert computed(runner) == [1]
    assert_empty(model, seq)


@pytest.mark.parametrize(("length", "cached"), [(64, 48), (65, 64)])
def test_a_cached_prompt_still_gives_drafts(length: int, cached: int) -> None:
    """At least its last token is computed."""
    model, runner = hashed()
    first, second = make_target(length), make_target(length)
    [draft] = model.draft([(first, 3)])
    model.cache.settle(first)  # what it has computed becomes findable
    runner.batches.clear()
    assert model.draft([(second, 3)]) == [draft]
    assert computed(runner) == [length - cached]
    assert_empty(model, first, second)


def test_without_prefix_caching_nothing_is_shared() -> None:
    model, runner = hashed(enable_prefix_caching=False)
    seqs = [make_target(64) for _ in range(2)]
    for seq in seqs:
        model.draft([(seq, 1)])
        model.cache.settle(seq)
        assert computed(runner) == [64]
    assert_empty(model, *seqs)


def test_a_step_takes_no_more_tokens_and_sequences_than_the_model_may_compute() -> None:
    model, runner = hashed(max_num_batched_tokens=50)
    seqs = [make_target(10, i) for i in range(10)]
    assert [len(draft) for draft in model.draft([(seq, 2) for seq in seqs])] == [2] * 5 + [0] * 5
    assert computed(runner) == [10] * 5
    for _ in range(2):
        drafts = model.draft([(seq, 2) for seq in seqs])
    assert [len(draft) for draft in drafts] == [2] * 8 + [0] * 2, "the first eight, in whatever steps"
    assert_empty(model, *seqs)


def test_all_prompts_together_are_caught_up_with_no_faster_than_one() -> None:
    model, runner = hashed()
    long, longer, short = make_target(300, 1), make_target(310, 2), make_target(16, 3)
    drafts = model.draft([(long, 2), (longer, 2), (short, 2)])
    assert sorted(computed(runner)) == [16, 256] and [len(draft) for draft in drafts] == [0, 0, 2]
    drafts = model.draft([(long, 2), (longer, 2)])
    assert sorted(computed(runner)) == [44, 212] and [len(draft) for draft in drafts] == [2, 0]
    assert_empty(model, long, longer, short)


def test_nothing_is_computed_of_a_sequence_that_is_too_long_for_the_model() -> None:
    model, runner = hashed(max_model_len=32)
    seq = make_target(40)
    assert model.draft([(seq, 3)]) == [[]]
    assert not runner.batches
    assert_empty(model, seq)


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_are_no_numbers_give_no_token_and_disturb_nobody(overlaps: bool, tmp_path: Path) -> None:
    """What such logits give is no token, and none of the embeddings lies before the first."""
    path = make_model(tmp_path, "llama", num_hidden_layers=1)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][300] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    model = DraftModel(make_gpu_runner(path), LIMITS) if overlaps else make_draft(path)
    broken, beside = make_target(7), make_target(20)
    beside.tokens[:] = [min(token, 299) for token in beside.tokens]
    broken.tokens[3] = 300
    nothing, drafts = model.draft([(broken, 3), (beside, 3)])
    assert {*nothing} == {NO_TOKEN} and drafts == reference_greedy(path, beside.tokens, 3)[0]
    assert_empty(model, broken, beside)
