"""Rotary position embeddings: inverse frequencies of every scaling that dense Llama-likes use.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (2306.15595); dynamic NTK; YaRN (2309.00071);
Llama 3.1's frequency bands. Formulas agree with Hugging Face transformers, except that dynamic NTK is
fixed for the served length: transformers rescales as a sequence grows, which no cached key survives.
"""

from __future__ import annotations

import math

import torch
from pagewire_core.errors import StartupError

from pagewire_engine.models.config import ModelConfig


class RotaryEmbedding:
    """cos and sin for positions; `inv_freq` float32 [head_dim / 2]."""

    def __init__(self, config: ModelConfig, max_model_len: int) -> None:
        rope_type = config.rope["rope_type"]
        scale = _SCALINGS.get(rope_type)
        if scale is None:
            raise StartupError(f"RoPE scaling {rope_type!r} is not supported; supported are {', '.join(_SCALINGS)}")
        try:
            inv_freq, self._factor = scale(config, max_model_len)
        except KeyError as error:
            raise StartupError(f"config.json's RoPE scaling {rope_type!r} lacks {error.args[0]!r}") from None
        self._inv_freq = inv_freq.to(config.device)
        self._dtype = config.dtype

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int64 [T] -> cos, sin [T, head_dim] in the model's dtype (halves repeated)."""
        angles = positions[:, None].float() * self._inv_freq
        angles = torch.cat((angles, angles), -1)
        return (angles.cos() * self._factor).to(self._dtype), (angles.sin() * self._factor).to(self._dtype)

    def table(self, num_positions: int) -> torch.Tensor:
        """float32 [num_positions, head_dim]: cos of each angle in the first half of a row, sin in the second."""
        positions = torch.arange(num_positions, dtype=torch.float32, device=self._inv_freq.device)
        angles = positions[:, None] * self._inv_freq
        return torch.cat((angles.cos(), angles.sin()), -1) * self._factor


def _base(config: ModelConfig, theta: float | None = None) -> torch.Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return 1.0 / ((theta or config.rope["rope_theta"]) ** exponents)


def _default(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    return _base(config), 1.0


def _linear(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    return _base(config) / config.rope["factor"], 1.0


def _dynamic(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    factor, trained = config.rope["factor"], config.max_position_embeddings
    length = max(max_model_len, trained)
    grown = config.rope["rope_theta"] * ((factor * length / trained) - (factor - 1)) ** (
        config.head_dim / (config.head_dim - 2)
    )
    return _base(config, grown), 1.0


def _llama3(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    rope = config.rope
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    inv_freq = _base(config)
    wavelength = 2 * math.pi / inv_freq
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    medium = (wavelength >= trained / high) & (wavelength <= trained / low)
    return torch.where(medium, blended, scaled), 1.0


def _yarn(config: ModelConfig, max_model_len: int) -> tuple[torch.Tensor, float]:
    rope, dim = config.rope, config.head_dim
    trained, factor = rope["original_max_position_embeddings"], rope["factor"]

    def mscale(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)

    def dimension(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))).clamp(0, 1)
    inv_freq = _base(config)
    return (inv_freq / factor) * ramp + inv_freq * (1 - ramp), float(attention)


_SCALINGS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
