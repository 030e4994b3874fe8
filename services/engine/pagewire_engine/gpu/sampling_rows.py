"""The sampling parameters of a step's rows as arrays, rewritten only where a row's request changed.

Temperature and truncation of all rows go to the device this way; for bans, bias and penalties see changed_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pagewire_kernels.sampling_tensors import SamplingTensors
from torch import Tensor

from pagewire_engine.gpu.transfers import Arrays
from pagewire_engine.sampler import SampleRow, uniform
from pagewire_engine.sampling_params import SamplingParams

PLAIN = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float64, "min_p": np.float32}


class SamplingRows:
    """Row r of a step is mostly the same request's as row r of the step before."""

    def __init__(self) -> None:
        self._params: list[SamplingParams | None] = []
        self._arrays: Arrays = {name: np.zeros(0, dtype) for name, dtype in PLAIN.items()}

    def arrays(self, rows: Sequence[SampleRow], num_tokens: np.ndarray) -> Arrays:
        """temperature, top_k, top_p, min_p, uniforms [R]; num_tokens [R]: the tokens before each row's."""
        if len(rows) > len(self._params):
            self._grow(len(rows))
        for r, row in enumerate(rows):
            if row.params is not self._params[r]:
                self._set(r, row.params)
        arrays = {name: array[: len(rows)] for name, array in self._arrays.items()}
        uniforms = np.zeros(len(rows), np.float64)
        for r in np.flatnonzero(arrays["temperature"]).tolist():
            uniforms[r] = uniform(rows[r].params.seed, rows[r].choice, int(num_tokens[r]))
        return arrays | {"uniforms": uniforms}

    def _grow(self, num_rows: int) -> None:
        more = num_rows - len(self._params)
        self._params += [None] * more
        self._arrays = {name: np.pad(array, (0, more)) for name, array in self._arrays.items()}

    def _set(self, r: int, params: SamplingParams) -> None:
        self._params[r] = params
        for name, array in self._arrays.items():
            array[r] = getattr(params, name)


def plain_sampling(arrays: dict[str, Tensor], neutral: SamplingTensors) -> SamplingTensors:
    """Row r's parameters under seat r. neutral: of one seat, which stands for all in everything else."""
    rows, fields = len(arrays["temperature"]), {}
    for name in SamplingTensors.__slots__:
        one = getattr(neutral, name)
        fields[name] = arrays[name] if name in PLAIN else one.expand(rows, *one.shape[1:])
    return SamplingTensors(**fields)


def neutral_sampling(vocabulary: int, device: torch.device) -> SamplingTensors:
    """For `plain_sampling`."""
    return SamplingTensors.neutral(1, vocabulary, device, max_banned=1, max_bias=1)
