"""What --quantization costs the demo model, on text of its own grammar that it was not trained on.

The bounds are what docs/decisions/0009-cpu-step.md states. Measured against float32: perplexity times 1.0000
(bfloat16), 1.0003 (int8), 1.0042 (int4); relative error of the logits 0.003, 0.027, 0.078.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pagewire_core.model_dir import resolve_model
from pagewire_engine.batch import Batch
from pagewire_engine.cpu.runner import CpuRunner
from pagewire_engine.loader import load
from pagewire_engine.options import EngineOptions
from pagewire_engine.sampler import SampleRow
from pagewire_engine.sampling_params import SamplingParams
from tokenizers import Tokenizer

MODELS = Path(__file__).parents[2] / "models"
DEMO = MODELS / "pagewire-demo"
VOCAB = 2048
DOCUMENTS = 12


@pytest.fixture(scope="module")
def documents() -> Iterator[list[list[int]]]:
    """Token ids of documents from a seed that the training did not use."""
    before = set(sys.modules)
    sys.path.insert(0, str(MODELS / "recipe"))
    corpus: ModuleType = importlib.import_module("corpus")
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    texts = ["".join(part.text for part in document) for document in islice(corpus.documents(seed=77_777), DOCUMENTS)]
    yield [tokenizer.encode(text).ids[:256] for text in texts]
    sys.path.remove(str(MODELS / "recipe"))
    for name in set(sys.modules) - before:
        del sys.modules[name]


@cache
def runner(dtype: str, quantization: str | None) -> CpuRunner:
    options = EngineOptions(dtype=dtype, quantization=quantization, max_model_len=512, kv_cache_memory_bytes=8 << 20)
    made = load(resolve_model(str(DEMO)), options).runner
    assert isinstance(made, CpuRunner)
    return made


def logprobs(text: list[int], dtype: str, quantization: str | None = None) -> np.ndarray:
    """Log probabilities [tokens, vocabulary] of the token after each."""
    rows = np.arange(len(text), dtype=np.int32)
    params = SamplingParams(temperature=0.0, logprobs=VOCAB)
    batch = Batch(
        scheduled=(),
        input_ids=np.array(text, np.int32),
        positions=rows,
        query_start=np.array([0, len(text)], np.int32),
        seq_lens=np.array([len(text)], np.int32),
        num_decode=0,
        tables=np.arange(32, dtype=np.int32)[None],
        seats=np.zeros(1, np.int32),
        table_changes=(0,),
        sample_from=rows,
        sample_rows=tuple(SampleRow(params, 0, text[: i + 1], 1) for i in range(len(text))),
        copies=(),
    )
    out = np.empty((len(text), VOCAB))
    for i, sampled in enumerate(runner(dtype, quantization).launch(batch).tokens()):
        ids, values = zip(*sampled.top, strict=True)
        out[i, list(ids)] = values
    return out


def perplexity(documents: list[list[int]], dtype: str, quantization: str | None = None) -> float:
    losses = [-logprobs(text, dtype, quantization)[np.arange(len(text) - 1), text[1:]] for text in documents]
    return float(np.exp(np.concatenate(losses).mean()))


@pytest.mark.parametrize(("quantization", "bound"), [(None, 1.001), ("int8", 1.003), ("int4", 1.01)])
def test_perplexity_grows_by_no_more_than_is_stated(
    documents: list[list[int]], quantization: str | None, bound: float
) -> None:
    exact, ours = perplexity(documents, "float32"), perplexity(documents, "bfloat16", quantization)
    print(f"{quantization or 'bfloat16'}: perplexity {ours:.4f}, float32 {exact:.4f}, ratio {ours / exact:.4f}")
    assert ours / exact < bound


@pytest.mark.parametrize(("quantization", "bound"), [(None, 0.005), ("int8", 0.035), ("int4", 0.1)])
def test_logits_are_no_further_from_float32_than_is_stated(
    documents: list[list[int]], quantization: str | None, bound: float
) -> None:
    """Root mean square of the error over the spread of the log probabilities."""
    exact, ours = logprobs(documents[0], "float32"), logprobs(documents[0], "bfloat16", quantization)
    error = np.sqrt(np.square(ours - exact).mean() / np.square(exact - exact.mean()).mean())
    print(f"{quantization or 'bfloat16'}: relative error of the logits {error:.4f}")
    assert error < bound
