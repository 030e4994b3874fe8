"""Weights and KV in fewer bits on GpuRunner: exactly the model they stand for, and how far from the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_runners import CPU, LIMITS, make_gpu_runner, make_torch_runner
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.loader import load
from pagewire_engine.model_runner import Runner, TorchRunner
from pagewire_engine.models.config import read_config
from pagewire_engine.models.dense import DenseModel
from pagewire_engine.options import EngineOptions
from pagewire_engine.quantization import SCHEMES, dequantize, quantize
from pagewire_engine.weights import Checkpoint
from pagewire_transfer import wire
from scripted_batches import Script
from tiny_models import ARCHITECTURES, VOCAB, make_model
from torch import Tensor

FP8 = torch.float8_e4m3fn
PROMPT = np.random.default_rng(0).integers(5, VOCAB, 60).tolist()
OUTPUT = np.random.default_rng(1).integers(5, VOCAB, 20).tolist()


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, and of widths that groups of 32 divide."""
    path = tmp_path_factory.mktemp("models") / request.param
    return make_model(path, request.param, intermediate_size=128, tie_word_embeddings=False)


class Dequantized(Checkpoint):
    """The checkpoint as its quantized form has it, in float32."""

    scheme = "int8"

    def take(self, name: str, shape: tuple[int, ...], rows: tuple[int, int] | None = None) -> Tensor:
        weight = super().take(name, shape, rows)
        scheme = SCHEMES[self.scheme].for_head if name.startswith("lm_head") else SCHEMES[self.scheme]
        matrix = weight.ndim == 2 and "embed" not in name
        return dequantize(quantize(weight, scheme)) if matrix and scheme else weight


def log_probabilities(runner: Runner) -> np.ndarray:
    """float [tokens, V] of a forced continuation: the prompt in two chunks, then one token at a time."""
    script, found = Script(), []
    seq = script.add(PROMPT, logprobs=VOCAB)
    runner.launch(script.batch((seq, 37))).tokens()
    for token in (*OUTPUT, None):
        [sampled] = runner.launch(script.batch((seq, len(seq.tokens) - seq.num_computed))).tokens()
        row = np.empty(VOCAB)
        row[[token for token, _ in sampled.top]] = [value for _, value in sampled.top]
        found.append(row)
        if token is not None:
            seq.tokens.append(token)
    return np.array(found)


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence, nats."""
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_alone_in_fewer_bits_are_the_dequantized_model(model: Path, scheme: str) -> None:
    """Packing, order of groups, biases, head: any mistake is far more than rounding."""
    checkpoint = type("Checkpoint", (Dequantized,), {"scheme": scheme})
    with torch.inference_mode():
        config = read_config(resolve_model(str(model)).config, torch.float32, CPU)
        with checkpoint(model, torch.float32, CPU) as tensors:
            dense = DenseModel(config, tensors, LIMITS.max_model_len)
    expected = log_probabilities(TorchRunner(dense, KVCache(config, LIMITS.num_blocks, LIMITS.block_size)))
    found = log_probabilities(make_gpu_runner(model, scheme=scheme))
    assert np.abs(found - expected).max() < 2e-3


@pytest.mark.parametrize(
    ("scheme", "kv_dtype", "bound"),
    [("int8", None, 0.005), ("int4", None, 0.5), ("fp8", None, 0.2), (None, FP8, 0.05), ("int8", FP8, 0.06)],
    ids=str,
)
def test_fewer_bits_cost_no_more_than_this(
    model: Path, scheme: str | None, kv_dtype: torch.dtype | None, bound: float
) -> None:
    """Nats of the next token's distribution; these tiny random models amplify errors some ten times."""
    expected = log_probabilities(make_torch_runner(model))
    found = log_probabilities(make_gpu_runner(model, scheme=scheme, kv_dtype=kv_dtype))
    assert 1e-6 < divergence(expected, found) < bound


def test_bfloat16_stays_near_float32(model: Path) -> None:
    expected = log_probabilities(make_torch_runner(model))
    assert divergence(expected, log_probabilities(make_gpu_runner(model, dtype=torch.bfloat16))) < 0.01


def test_an_fp8_page_that_nobody_wrote_is_never_read(model: Path) -> None:
    """e4m3 has a NaN: free pages hold it, and one read of them would make every token after it 0."""
    runner = make_gpu_runner(model, kv_dtype=FP8)
    assert runner.cache.kv.dtype == FP8 and runner.cache.kv.float().isnan().all()
    assert np.isfinite(log_probabilities(runner)).all()


def test_copied_blocks_of_an_fp8_cache_hold_the_same(model: Path) -> None:
    runner = make_gpu_runner(model, kv_dtype=FP8)
    log_probabilities(runner)
    written = int((~runner.cache.kv[0, 0, :, 0, 0, 0].float().isnan()).nonzero()[0])
    free = int(runner.cache.kv[0, 0, :, 0, 0, 0].float().isnan().nonzero()[0])
    runner.cache.copy_blocks([(written, free)])
    kv = runner.cache.kv.view(torch.uint8)
    assert torch.equal(kv[:, :, written], kv[:, :, free])


def test_an_fp8_prompt_travels_bit_for_bit(model: Path) -> None:
    """A prefill worker's pages, over the wire form, in other blocks of a decode worker: half the bytes of bfloat16."""
    sender, receiver = make_gpu_runner(model, kv_dtype=FP8), make_gpu_runner(model, kv_dtype=FP8)
    receiver.cache.compile_copies()  # as at a start
    script = Script()
    seq = script.add(PROMPT)
    sender.launch(script.batch((seq, len(PROMPT)))).tokens()
    layers, tokens = (0, sender.config.num_layers), (0, len(PROMPT))
    chunk = sender.cache.gather(seq.blocks, layers, tokens)
    received = wire.from_bytes(sender.cache.layout, wire.ChunkRange(layers, tokens), wire.to_bytes(chunk))
    elsewhere = [(block + 7) % LIMITS.num_blocks for block in seq.blocks]
    receiver.cache.scatter(received, elsewhere, layers, tokens)
    assert torch.equal(receiver.cache.gather(elsewhere, layers, tokens).view(torch.uint8), chunk.view(torch.uint8))
    assert chunk.nbytes == len(PROMPT) * sender.cache.bytes_per_token


def test_an_fp8_pool_on_a_cpu_is_refused(model: Path) -> None:
    with pytest.raises(StartupError, match="--kv-cache-dtype fp8 needs a CUDA device"):
        load(resolve_model(str(model)), EngineOptions(device="cpu", kv_cache_dtype="fp8", max_model_len=64))
