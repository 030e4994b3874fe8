"""The engine alone against Hugging Face transformers on the same weights, float32, token for token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, assert_empty, make_engine, run_all
from pagewire_core.errors import ContextLength, Internal, StartupError
from pagewire_engine.events import Failed, Finished, FirstTokens, Progress, Started, Token
from tiny_models import ARCHITECTURES, ROPES, VOCAB, make_model, reference_greedy

LENGTHS = (1, 5, 16, 33, 100)  # one token, less than a block, a block, a bit more than two, several chunks


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, VOCAB) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("rope", [None, *ROPES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_the_reference(architecture: str, rope: str | None, tmp_path: Path) -> None:
    """Chunked prefill, continuous batching and paged attention change nothing; nor does a prefix hit."""
    changes = {"rope_parameters": {"rope_theta": 10000.0, **ROPES[rope]}} if rope else {}
    path = make_model(tmp_path, architecture, **changes)
    engine = make_engine(path)
    expected = [reference_greedy(path, prompt, 12) for prompt in prompts(*LENGTHS)]
    assert len({token for tokens, _ in expected for token in tokens}) > 20, "the checkpoint's output hardly varies"
    for _ in range(2):  # the second time from the prefix cache
        runs = [Run(prompt, logprobs=0) for prompt in prompts(*LENGTHS)]
        run_all(engine, *runs)
        for run, (tokens, logprobs) in zip(runs, expected, strict=True):
            assert run.tokens() == tokens
            assert run.logprobs() == pytest.approx(logprobs, abs=1e-3)
    assert engine.counters.prompt_tokens_cached == 16 * (0 + 0 + 0 + 2 + 6)
    assert engine.counters.prompt_tokens_computed == 2 * sum(LENGTHS) - engine.counters.prompt_tokens_cached


def test_an_old_style_rope_scaling_means_the_same_as_a_new_one(tmp_path: Path) -> None:
    """Checkpoints on the Hub still say rope_theta and rope_scaling."""
    import json

    new = make_model(tmp_path / "new", "llama", rope_parameters={"rope_theta": 5000.0, **ROPES["llama3"]})
    old = make_model(tmp_path / "old", "llama", rope_parameters={"rope_theta": 5000.0, **ROPES["llama3"]})
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (old / "config.json").write_text(json.dumps(config))
    outputs = []
    for path in (new, old):
        run = Run(prompts(90)[0])
        run_all(make_engine(path), run)
        outputs.append(run.tokens())
    assert outputs[0] == outputs[1] == reference_greedy(new, prompts(90)[0], 12)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "rope_theta": 1e4,
                             "original_max_position_embeddings": 64}},
    ],
    ids=["beside rope_parameters", "trained length beside it", "factor of the two lengths"],
)  # fmt: skip
def test_a_scaling_that_was_written_by_hand_is_the_references(changes: dict[str, Any], tmp_path: Path) -> None:
    import json

    path = make_model(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    run = Run(prompts(90)[0], logprobs=0)
    run_all(make_engine(path), run)
    tokens, logprobs = reference_greedy(path, prompts(90)[0], 12)
    assert run.tokens() == tokens and run.logprobs() == pytest.approx(logprobs, abs=1e-3)


def test_sharded_and_biased_checkpoints_load(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", shard_size="100KB", attention_bias=True, mlp_bias=True)
    assert (path / "model.safetensors.index.json").exists()
    run = Run(prompts(40)[0])
    run_all(make_engine(path), run)
    assert run.tokens() == reference_greedy(path, prompts(40)[0], 12)[0]


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_the_page_size_does_not_show(llama: Path, block_size: int) -> None:
    runs = [Run(prompt) for prompt in prompts(7, 64, 70)]
    run_all(make_engine(llama, block_size=block_size), *runs)
    assert [run.tokens() for run in runs] == [reference_greedy(llama, p, 12)[0] for p in prompts(7, 64, 70)]


def test_a_preempted_sequence_resumes_with_the_same_tokens(llama: Path) -> None:
    """A pool too small for all: whoever came last gives its blocks back and is computed anew."""
    asked = prompts(60, 61, 62, 63)
    # 384 bytes a token: room for 16 blocks of 16 tokens, four sequences of 6 blocks want 24.
    engine = make_engine(llama, kv_cache_memory_bytes=384 * 256, enable_prefix_caching=False)
    runs = [Run(prompt, max_tokens=30, temperature=0.9, seed=i) for i, prompt in enumerate(asked)]
    run_all(engine, *runs)
    assert engine.counters.preemptions > 0
    roomy = [Run(prompt, max_tokens=30, temperature=0.9, seed=i) for i, prompt in enumerate(asked)]
    run_all(make_engine(llama), *roomy)
    assert [run.tokens() for run in runs] == [run.tokens() for run in roomy]


def test_choices_share_the_prompt_and_then_go_their_own_way(llama: Path) -> None:
    """n = 3: one prefill, copy-on-write of the half-full block, three seeded streams as if alone."""
    [prompt] = prompts(21)
    engine = make_engine(llama)
    run = Run(prompt, n=3, temperature=1.0, seed=5, max_tokens=20)
    run_all(engine, run)
    assert engine.counters.prompt_tokens_computed == 21
    outputs = [run.tokens(choice) for choice in range(3)]
    assert len({tuple(output) for output in outputs}) == 3
    again = Run(prompt, n=3, temperature=1.0, seed=5, max_tokens=20)
    run_all(engine, again, Run(prompts(50, seed=3)[0]))
    assert [again.tokens(choice) for choice in range(3)] == outputs


def test_greedy_choices_are_all_the_reference(llama: Path) -> None:
    [prompt] = prompts(35)
    run = Run(prompt, n=4)
    run_all(make_engine(llama), run)
    assert [run.tokens(choice) for choice in range(4)] == [reference_greedy(llama, prompt, 12)[0]] * 4


def test_events_come_in_their_order(llama: Path) -> None:
    run = Run(prompts(60)[0], max_tokens=3)
    run_all(make_engine(llama), run)
    assert [type(event) for event in run.events] == [Started, Token, Token, Token, Finished]
    assert [event.finish_reason is not None for event in run.events[1:4]] == [False, False, True]


def test_a_prefill_only_request_holds_its_blocks_until_released(llama: Path) -> None:
    engine = make_engine(llama)
    run = Run(prompts(100)[0], prefill_only=True, n=2, temperature=1.0, seed=1)
    engine.submit(run.request)
    while engine.step():
        engine.check()
    kinds = [type(event) for event in run.events]
    assert kinds == [Started, Progress, Progress, Progress, FirstTokens]
    assert [e.num_computed for e in run.events if isinstance(e, Progress)] == [40, 80, 100]
    assert engine.blocks.num_held == 7
    both = Run(prompts(100)[0], n=2, temperature=1.0, seed=1)
    engine.submit(both.request)
    while engine.step():
        pass
    first = run.events[-1]
    assert isinstance(first, FirstTokens)
    assert [s.token for s in first.tokens] == [both.tokens(0)[0], both.tokens(1)[0]]
    engine.release(run.request)
    assert_empty(engine)


def test_a_prompt_that_is_being_sent_keeps_its_blocks_until_released(llama: Path) -> None:
    """Its last block equals one in the cache. A transfer that reads the block's first half must find it to the end."""
    engine = make_engine(llama, max_num_batched_tokens=8)
    layers = (0, len(engine.runner.cache.kv))
    [prompt] = prompts(96)
    first, again = (Run(prompt, prefill_only=True) for _ in range(2))
    engine.submit(first.request)
    while engine.step():
        pass
    expected = engine.runner.cache.gather(engine.block_table(first.request), layers, (0, 96))
    engine.release(first.request)
    engine.submit(again.request)
    tables = []
    while engine.step():
        tables.append(engine.block_table(again.request))
    assert len(tables) == 2 and tables[0] == tables[1]
    assert torch.equal(engine.runner.cache.gather(tables[0], layers, (0, 96)), expected)
    engine.release(again.request)
    assert_empty(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_a_cancelled_request_gives_everything_back_at_every_stage(llama: Path, steps: int) -> None:
    engine = make_engine(llama)
    run = Run(prompts(100)[0], n=2)
    engine.submit(run.request)
    for _ in range(steps):
        engine.step()
    engine.cancel(run.request)
    said = len(run.events)
    while engine.step():
        pass
    assert_empty(engine)
    assert len(run.events) == said


def test_a_stopped_choice_leaves_the_others_alone(llama: Path) -> None:
    engine = make_engine(llama)
    [prompt] = prompts(20)
    run = Run(prompt, n=2)
    engine.submit(run.request)
    for _ in range(4):
        engine.step()
    engine.cancel(run.request, [0])
    while engine.step():
        engine.check()
    assert run.tokens(1) == reference_greedy(llama, prompt, 12)[0]
    assert len(run.tokens(0)) < 12 and isinstance(run.events[-1], Finished)
    assert_empty(engine)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(llama: Path) -> None:
    engine = make_engine(llama)
    good = engine.runner.launch
    run = Run(prompts(20)[0])
    engine.submit(run.request)

    def broken(batch: Any) -> Any:
        raise RuntimeError("device lost")

    engine.runner.launch = broken  # type: ignore[method-assign]
    engine.step()
    [event] = [e for e in run.events if isinstance(e, Failed)]
    assert isinstance(event.error, Internal)
    assert_empty(engine)
    engine.runner.launch = good  # type: ignore[method-assign]
    again = Run(prompts(20)[0])
    run_all(engine, again)
    assert again.tokens() == reference_greedy(llama, prompts(20)[0], 12)[0]


def test_a_prompt_that_can_never_fit_is_refused(llama: Path) -> None:
    engine = make_engine(llama, max_model_len=64)
    with pytest.raises(ContextLength, match="64"):
        engine.submit(Run(prompts(64)[0]).request)


def test_output_stops_at_the_context_length(llama: Path) -> None:
    run = Run(prompts(60)[0], max_tokens=50)
    run_all(make_engine(llama, max_model_len=64), run)
    assert len(run.tokens()) == 4


BAD_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
    "activation": ({"hidden_act": "gelu"}, "activation 'gelu'"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantized .awq."),
    "rope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not supported"),
    "a long rope": ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "'longrope' is not supported"),
    "half a rope": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "lacks 'factor'"),
    "a rope of words": ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor '4', which is not a number"),
    "an encoder": ({"is_causal": False}, "is_causal is false"),
    "heads": ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 kv heads"),
    "shape": ({"intermediate_size": 96}, "do not belong together"),
    "more layers": ({"num_hidden_layers": 4}, "has no tensor model.layers.3"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_run_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    import json

    changes, sentence = BAD_MODELS[case]
    path = make_model(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match=sentence):
        make_engine(path)


def test_corrupt_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(StartupError, match=r"cannot read .*model.safetensors.* download the model again"):
        make_engine(path)


def test_a_pool_too_small_for_one_sequence_is_refused(llama: Path) -> None:
    with pytest.raises(StartupError, match="lower --max-model-len or raise --kv-cache-memory-bytes"):
        make_engine(llama, kv_cache_memory_bytes=384 * 64)


def test_dynamic_ntk_equals_the_reference_up_to_the_trained_length(tmp_path: Path) -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    path = make_model(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=128)
    run = Run(prompts(90)[0])
    run_all(make_engine(path, max_model_len=None), run)
    assert run.tokens() == reference_greedy(path, prompts(90)[0], 12)[0]


def test_a_length_the_model_was_not_made_for_is_refused(llama: Path) -> None:
    with pytest.raises(StartupError, match="513 is more than the 512 positions"):
        make_engine(llama, max_model_len=513)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_differs_from_the_reference_only_at_near_ties(architecture: str, tmp_path: Path) -> None:
    """The reference runs the same rounded weights in float32; only what it holds for nearly equal may be exchanged."""
    import torch
    from transformers import AutoModelForCausalLM

    path = make_model(tmp_path, architecture)
    engine = make_engine(path, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").float().eval()
    near_ties = num_tokens = 0
    for prompt in prompts(*LENGTHS, seed=9):
        run = Run(prompt)
        run_all(engine, run)
        tokens = list(prompt)
        for token in run.tokens():
            with torch.inference_mode():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
            gap = (logits.max() - logits[token]).item()
            assert gap <= 0.15, f"token {len(tokens)} is {gap} below the reference's best"
            near_ties += gap > 0
            num_tokens += 1
            tokens.append(token)
    print(f"{architecture}: {near_ties} of {num_tokens} tokens are near-ties")
    assert near_ties <= 3, "more near-ties than rounding explains"


def test_a_float16_checkpoint_is_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    """float16 arithmetic is a hundred times slower there; the values are the checkpoint's own."""
    import torch
    from tiny_models import reference_model

    path = make_model(tmp_path / "model", "llama")
    reference_model(path).to(torch.float16).save_pretrained(path)
    reference_model.cache_clear()
    engine = make_engine(path)
    assert engine.runner.cache.kv.dtype == torch.float32
    run = Run(prompts(50)[0])
    run_all(engine, run)
    assert run.tokens() == reference_greedy(path, prompts(50)[0], 12)[0]


def test_a_request_does_not_see_who_else_is_in_the_batch(llama: Path) -> None:
    """Alone, in a full batch, and behind others' chunks: the same tokens, seeded or greedy."""
    [prompt] = prompts(45, seed=21)
    sampled: dict[str, Any] = {"temperature": 0.8, "seed": 3, "top_p": 0.95}
    alone = [Run(prompt), Run(prompt, **sampled)]
    for run in alone:
        run_all(make_engine(llama), run)
    crowd = [Run(other, temperature=1.0, seed=i) for i, other in enumerate(prompts(*range(3, 90, 9), seed=22))]
    together = [Run(prompt), Run(prompt, **sampled)]
    run_all(make_engine(llama), *crowd[:5], *together, *crowd[5:])
    assert [run.tokens() for run in together] == [run.tokens() for run in alone]
