"""The compiled CPU step against plain torch, and against itself: any batch, any chunking, any number of threads."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_core.machine import available_cpus
from pagewire_core.model_dir import resolve_model
from pagewire_engine.batch import Batch
from pagewire_engine.cpu.runner import CpuRunner
from pagewire_engine.loader import load
from pagewire_engine.model_runner import Runner, TorchRunner
from pagewire_engine.options import EngineOptions
from pagewire_engine.quantization import SCHEMES, Scheme, dequantize, quantize
from pagewire_engine.sampler import Sampled, SampleRow, sample
from pagewire_engine.sampling_params import SamplingParams
from pagewire_kernels.cpu.build import runnable
from safetensors.torch import load_file, save_file

VOCAB = tiny_models.VOCAB
BLOCK = 16
LENGTH = 128
ALL = SamplingParams(temperature=0.0, logprobs=VOCAB)  # the whole distribution comes back


@pytest.fixture(scope="module", params=sorted(tiny_models.ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that bfloat16 holds exactly, so that two precisions run the same model."""
    path = tiny_models.make_model(tmp_path_factory.mktemp(request.param), request.param)
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(autouse=True, scope="module")
def no_step_is_small() -> Iterator[None]:
    """These models are so tiny that their steps would run on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagewire_engine.cpu.runner.SMALL_STEP", 0)
        yield


def make_runner(path: Path, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> Runner:
    """Poisoned pages; `monkeypatch` forces plain torch."""
    if monkeypatch:
        monkeypatch.setenv("PAGEWIRE_KERNELS", "torch")
    chosen: dict[str, Any] = {"max_model_len": LENGTH, "kv_cache_memory_bytes": 4 << 20, "threads": 1} | options
    runner = load(resolve_model(str(path)), EngineOptions(**chosen, poison_free_blocks=True)).runner
    assert isinstance(runner, TorchRunner if monkeypatch else CpuRunner)
    return runner


Chunk = tuple[int, int, int]  # sequence, first position, end


def distributions(runner: Runner, texts: list[list[int]], chunks: list[Chunk]) -> np.ndarray:
    """Runs one step; log probabilities [chunks, vocabulary] after the last row of each."""
    out = np.empty((len(chunks), VOCAB))
    for i, sampled in enumerate(step(runner, texts, chunks, [ALL] * len(chunks))):
        ids, values = zip(*sampled.top, strict=True)
        out[i, list(ids)] = values
    return out


def step(
    runner: Runner,
    texts: list[list[int]],
    chunks: list[Chunk],
    params: list[SamplingParams],
    allowed: np.ndarray | None = None,
) -> list[Sampled]:
    """Runs one step; the token chosen after the last row of each chunk. allowed: bool [chunks, vocabulary]."""
    blocks = LENGTH // BLOCK
    tables = np.arange(len(texts) * blocks, dtype=np.int32)[::-1].copy().reshape(len(texts), blocks)
    ordered = sorted(range(len(chunks)), key=lambda i: chunks[i][2] - chunks[i][1] > 1)
    chosen = [chunks[i] for i in ordered]
    starts = np.cumsum([0] + [end - begin for _, begin, end in chosen]).astype(np.int32)
    positions = [p for _, begin, end in chosen for p in range(begin, end)]
    rows = tuple(SampleRow(params[i], 0, texts[chunks[i][0]][: chunks[i][2]], 1) for i in ordered)
    batch = Batch(
        scheduled=(),
        input_ids=np.array([t for s, begin, end in chosen for t in texts[s][begin:end]], np.int32),
        positions=np.array(positions, np.int32),
        query_start=starts,
        seq_lens=np.array([end for _, _, end in chosen], np.int32),
        num_decode=sum(end - begin == 1 for _, begin, end in chosen),
        tables=tables,
        seats=np.array([s for s, _, _ in chosen], np.int32),
        table_changes=tuple(range(len(texts))),
        sample_from=starts[1:] - 1,
        sample_rows=rows,
        copies=(),
        allowed=None if allowed is None else np.packbits(allowed[ordered], axis=1, bitorder="little").view(np.uint32),
    )
    tokens = runner.launch(batch).tokens()
    return [tokens[ordered.index(i)] for i in range(len(chunks))]


def texts_of(count: int, length: int = 100, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, VOCAB, (count, length)).tolist()


MIXED_STEPS: list[list[Chunk]] = [
    [(0, 0, 37), (1, 0, 5)],
    [(1, 5, 6), (0, 37, 90), (2, 0, 1)],
    [(0, 90, 91), (1, 6, 7), (2, 1, 40)],
]


def test_it_computes_what_plain_torch_computes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt chunks, decode rows beside a chunk, and a window that ends inside a page."""
    compiled = make_runner(model, dtype="float32")
    plain = make_runner(model, monkeypatch, dtype="float32")
    for chunks in MIXED_STEPS:
        difference = distributions(compiled, texts_of(3), chunks) - distributions(plain, texts_of(3), chunks)
        assert np.abs(difference).max() < 2e-4


def test_in_bfloat16_it_is_nearer_to_float32_than_plain_torch_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rounds once where torch rounds after every operation."""
    runners = [make_runner(model, dtype=dtype) for dtype in ("float32", "bfloat16")]
    runners.append(make_runner(model, monkeypatch, dtype="bfloat16"))
    squares = np.zeros(2)
    for chunks in MIXED_STEPS:
        exact, ours, plain = (distributions(runner, texts_of(3), chunks) for runner in runners)
        squares += np.square(ours - exact).mean(), np.square(plain - exact).mean()
    assert squares[0] < squares[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
@settings(max_examples=10)
def test_a_row_does_not_depend_on_its_batch_or_on_the_chunks_before_it(
    model: Path, dtype: str, data: st.DataObject
) -> None:
    """Otherwise a stream that moves to another worker, or is preempted, could go on with other tokens."""
    check_rows_do_not_depend_on_their_batch(model, data, dtype=dtype)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@given(data=st.data())
@settings(max_examples=5)
def test_nor_does_it_with_wide_heads_and_quantized_weights(
    wide_heads: Path, quantization: str | None, data: st.DataObject
) -> None:
    check_rows_do_not_depend_on_their_batch(wide_heads, data, dtype="bfloat16", quantization=quantization)


def check_rows_do_not_depend_on_their_batch(model: Path, data: st.DataObject, **options: Any) -> None:
    texts = texts_of(3)
    whole = make_runner(model, **options)
    expected = {end: distributions(whole, texts, [(0, 0, end)])[0] for end in (1, 33, 64, 79, 100)}
    runner = make_runner(model, threads=data.draw(st.sampled_from([1, 2, 3])), **options)
    done = [0, 0, 0]
    while done[0] < 100:
        chunks = []
        for s in range(3):
            size = data.draw(st.integers(0 if s else 1, 40))
            end = min(done[s] + size, 100)
            if s == 0:
                end = min(end, min(e for e in expected if e > done[0]))
            if end > done[s]:
                chunks.append((s, done[s], end))
        logprobs = distributions(runner, texts, chunks)
        for (s, _, end), row in zip(chunks, logprobs, strict=True):
            done[s] = end
            if s == 0 and end in expected:
                assert np.array_equal(row, expected[end])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_model(tmp_path_factory.mktemp("sampling"), "llama")


@given(
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 100, VOCAB]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 1 << 62),
)
@settings(max_examples=60)
def test_it_draws_the_token_that_the_reference_sampler_draws(
    llama: Path, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    runner = shared_runner(llama)
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed + i) for i in range(3)
    ]
    chunks: list[Chunk] = [(0, 0, 9), (1, 0, 1), (2, 0, 30)]
    logits = torch.from_numpy(distributions(runner, texts_of(3), chunks)).float()
    rows = [SampleRow(p, 0, texts_of(3)[s][:end], 1) for p, (s, _, end) in zip(params, chunks, strict=True)]
    drawn = step(runner, texts_of(3), chunks, params)
    assert [d.token for d in drawn] == [s.token for s in sample(logits, rows)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_no_token_is_chosen_that_the_mask_forbids(llama: Path, temperature: float, logprobs: int | None) -> None:
    """Also where the host samples, for its log probabilities; and the choice among the allowed is the same."""
    runner, chunks = shared_runner(llama), [(0, 0, 9), (1, 0, 1), (2, 0, 30)]
    params = [SamplingParams(temperature=temperature, seed=i, logprobs=logprobs) for i in range(3)]
    allowed = np.random.default_rng(1).random((3, VOCAB)) < 0.02
    tokens = [sampled.token for sampled in step(runner, texts_of(3), chunks, params, allowed)]
    assert all(allowed[i, token] for i, token in enumerate(tokens))
    logits = torch.from_numpy(np.where(allowed, distributions(runner, texts_of(3), chunks), -np.inf)).float()
    rows = [SampleRow(p, 0, texts_of(3)[s][:end], 1) for p, (s, _, end) in zip(params, chunks, strict=True)]
    assert tokens == [sampled.token for sampled in sample(logits, rows)]


_SHARED: dict[Path, Runner] = {}


def shared_runner(path: Path) -> Runner:
    """One for all of hypothesis' examples."""
    return _SHARED.setdefault(path, make_runner(path, dtype="float32")) if path not in _SHARED else _SHARED[path]


def test_logits_that_are_no_numbers_name_no_token(llama: Path) -> None:
    """A NaN compares false with everything: an argmax that overlooks it answers token 0 under HTTP 200."""
    runner = make_runner(llama, dtype="float32")
    runner.cache.kv[:] = torch.nan
    for temperature in (0.0, 1.0):
        for logprobs in (None, 0, 2):
            params = SamplingParams(temperature=temperature, logprobs=logprobs)
            [sampled] = step(runner, texts_of(1), [(0, 20, 21)], [params])
            assert sampled.is_nothing


@pytest.mark.parametrize("variant", runnable()[1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_variant_that_runs_here_computes_the_same(
    variant: str, dtype: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_variant(variant, dtype, model, monkeypatch)


@pytest.mark.parametrize("variant", runnable()[1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_it_does_with_wide_heads(
    variant: str, dtype: str, wide_heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_variant(variant, dtype, wide_heads, monkeypatch)


def check_variant(variant: str, dtype: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = make_runner(model, dtype=dtype)
    monkeypatch.setenv("PAGEWIRE_CPU_VARIANT", variant)
    other = make_runner(model, dtype=dtype)
    for chunks in MIXED_STEPS:
        difference = distributions(best, texts_of(3), chunks) - distributions(other, texts_of(3), chunks)
        assert np.abs(difference).max() < (2e-4 if dtype == "float32" else 0.15)


@pytest.fixture(scope="module", params=[32, 96, 128])
def wide_heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a number of dimensions that takes one or several tiles, and part of one."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": request.param, "num_hidden_layers": 2}
    return tiny_models.make_model(tmp_path_factory.mktemp("heads"), "llama", **sizes)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every matrix has a multiple of 128 inputs."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    return tiny_models.make_model(tmp_path_factory.mktemp("wide"), "llama", **sizes)


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int8", 64), *(Scheme("int4", g) for g in (32, 64, 128))])
def test_quantized_weights_are_computed_with_as_they_are(
    scheme: Scheme, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float32 on the dequantized weights: what is left is the rounding of activations to 8 bits."""
    many_rows: list[Chunk] = [(0, 0, 61), (1, 0, 50)]  # as many as go by a matrix unit
    monkeypatch.setitem(SCHEMES, scheme.name, scheme)
    runners = []
    for variant in runnable():
        monkeypatch.setenv("PAGEWIRE_CPU_VARIANT", variant)
        runners.append(make_runner(wide, dtype="float32", quantization=scheme.name))
    plain = make_runner(dequantized(wide, scheme, tmp_path / "dequantized"), monkeypatch, dtype="float32")
    for chunks in [many_rows, *MIXED_STEPS]:
        expected = distributions(plain, texts_of(3), chunks)
        for runner in runners:
            difference = distributions(runner, texts_of(3), chunks) - expected
            assert np.square(difference).mean() / np.square(expected - expected.mean()).mean() < 0.01


@pytest.fixture(scope="module")
def many_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three and five groups of 128 inputs: more than are multiplied in one go."""
    sizes = {"hidden_size": 384, "intermediate_size": 640, "head_dim": 32, "num_hidden_layers": 2}
    return tiny_models.make_model(tmp_path_factory.mktemp("inputs"), "llama", **sizes)


@pytest.mark.parametrize(
    "scheme", [None, Scheme("int8"), Scheme("int8", 64), *(Scheme("int4", g) for g in (32, 64, 128))]
)
@pytest.mark.parametrize("size", [1, 7, 15, 32, 47])
def test_many_rows_at_once_and_few_at_a_time_are_the_same_to_the_last_bit(
    scheme: Scheme | None, size: int, many_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix unit takes many rows of whatever weights, vectors take few: no row may tell which it was."""
    if scheme:
        monkeypatch.setitem(SCHEMES, scheme.name, scheme)
    runners = [
        make_runner(many_inputs, dtype="bfloat16", quantization=scheme and scheme.name, threads=threads)
        for threads in (1, 2)
    ]
    [expected] = distributions(runners[0], texts_of(1), [(0, 0, 99)])
    for begin in range(0, 99, size):
        [found] = distributions(runners[1], texts_of(1), [(0, begin, min(begin + size, 99))])
    assert np.array_equal(found, expected)


def dequantized(path: Path, scheme: Scheme, out: Path) -> Path:
    """The checkpoint with its matrices rounded as `scheme` rounds them."""
    shutil.copytree(path, out)
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        used = scheme.for_head if "lm_head" in name else scheme
        if weight.ndim == 2 and "embed" not in name and used:
            weights[name] = dequantize(quantize(weight, used))
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.timeout(60)
def test_threads_that_sleep_are_always_woken(llama: Path) -> None:
    """A phase's end once went unnoticed by a thread that was about to sleep: one request in ten thousand steps hung.

    More threads than cores, so that there is always one that sleeps.
    """
    runner = make_runner(llama, dtype="float32", threads=4)
    for i in range(400):
        step(runner, texts_of(1), [(0, i % 90, i % 90 + 1)], [SamplingParams(temperature=0.0)])


@pytest.mark.skipif(sys.platform != "linux" or len(available_cpus()) < 2, reason="needs Linux and two cores")
def test_each_thread_keeps_to_its_own_share_of_the_cores(llama: Path) -> None:
    """Where nothing is said of cores either: two threads that meet on one core take turns at every barrier."""

    def cores_of_threads() -> dict[int, set[int]]:
        return {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}

    before = cores_of_threads()
    runner = make_runner(llama, threads=2)
    with ThreadPoolExecutor(1) as caller:  # thread 0 of a step is who calls it
        caller.submit(step, runner, texts_of(1), [(0, 0, 8)], [ALL]).result()
        shares = [cores for task, cores in cores_of_threads().items() if task not in before]
    shares = [cores for cores in shares if cores != set(available_cpus())]
    assert len(shares) == 2 and not shares[0] & shares[1] and shares[0] | shares[1] == set(available_cpus())
