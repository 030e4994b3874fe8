"""What the GPU runner samples by, against sampler.py: rows that change their logits, alone and among others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagewire_engine.gpu.changed_rows import sample_changed
from pagewire_engine.gpu.sampling_rows import SamplingRows
from pagewire_engine.sampler import SampleRow, sample
from pagewire_engine.sampling_params import SamplingParams
from pagewire_kernels import ops

VOCAB = 97
PARAMS = st.fixed_dictionaries({
    "seed": st.integers(0, 9),
    "temperature": st.sampled_from([0.0, 0.7, 1.5]),
    "top_k": st.sampled_from([0, 3]),
    "top_p": st.sampled_from([1.0, 0.8]),
    "repetition_penalty": st.sampled_from([1.0, 1.4, 0.7]),
    "presence_penalty": st.sampled_from([0.0, 1.5]),
    "frequency_penalty": st.sampled_from([0.0, 0.6, -0.4]),
    "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 2.5, 5.0]), max_size=5),
    "min_tokens": st.sampled_from([0, 3]),
    "stop_token_ids": st.frozensets(st.integers(0, VOCAB - 1), max_size=9),
    "penalty_window": st.sampled_from([0, 0, 2]),
    "typical_p": st.sampled_from([1.0, 1.0, 0.6]),
    "watermark": st.sampled_from([False, False, True]),
})  # fmt: skip
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def rows_of(drawn: Sequence[tuple[dict[str, Any], list[int], int]]) -> list[SampleRow]:
    return [SampleRow(SamplingParams(**p), 0, tokens, min(n, len(tokens))) for p, tokens, n in drawn]


@settings(max_examples=60)
@given(st.lists(st.tuples(PARAMS, TOKENS, st.integers(1, 12)), min_size=1, max_size=5), st.integers(0, 999))
def test_changed_rows_are_sampled_as_the_host_samples_them(
    drawn: list[tuple[dict[str, Any], list[int], int]], seed: int
) -> None:
    """Rows that change nothing keep the token that the step chose for them."""
    rows = rows_of(drawn)
    logits = 3 * torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    num_tokens = np.array([len(row.tokens) for row in rows], np.int32)
    tokens = torch.full((len(rows),), -7)
    sample_changed(rows, num_tokens, SamplingRows().arrays(rows, num_tokens), logits, tokens)
    expected = sample(logits.clone(), rows)
    for row, token, choice in zip(rows, tokens.tolist(), expected, strict=True):
        changed = row.params.changes_logits or row.params.needs_sampler
        assert token == (choice.token if changed else -7)


def test_a_presence_penalty_before_the_first_token_reads_counts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel reads a row's counts where a penalty is set, even if nothing was counted: there must be such a row."""
    seen: list[tuple[int, ...]] = []
    choose = ops.sample

    def watched(logits: torch.Tensor, params: ops.SamplingTensors, *rest: torch.Tensor) -> None:
        seen.append(params.counts.stride())
        choose(logits, params, *rest)

    monkeypatch.setattr(ops, "sample", watched)
    rows = rows_of([({"temperature": 0.0, "presence_penalty": 1.0}, [5, 6], 2)] * 3)
    num_tokens = np.full(3, 2, np.int32)
    arrays = SamplingRows().arrays(rows, num_tokens)
    sample_changed(rows, num_tokens, arrays, torch.randn(3, VOCAB), torch.zeros(3, dtype=torch.int64))
    assert seen == [(VOCAB, 1)]


def test_the_parameters_of_a_row_follow_its_request() -> None:
    """Rows are compared by identity with the step before: a new request in an old row must not inherit."""
    sampling = SamplingRows()
    warm, cold = rows_of([({"temperature": 0.9, "top_k": 5, "seed": 3}, [1, 2], 1), ({"temperature": 0.0}, [1], 1)])
    first = sampling.arrays([warm, cold, warm], np.array([2, 1, 2]))
    assert first["temperature"].tolist() == [np.float32(0.9), 0.0, np.float32(0.9)]
    assert first["top_k"].tolist() == [5, 0, 5]
    assert first["uniforms"][0] == first["uniforms"][2] != 0.0
    second = sampling.arrays([cold, warm], np.array([1, 3]))
    assert second["top_k"].tolist() == [0, 5] and second["uniforms"][0] == 0.0
    assert second["uniforms"][1] != first["uniforms"][0], "another position, another number"
