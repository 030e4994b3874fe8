"""The range of every sampling parameter; the one place that refuses a value."""

from __future__ import annotations

import math

from pagewire.v1 import common_pb2
from pagewire_core.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 4096
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_LENGTH = 256

# field -> (lowest, highest, lowest is allowed, how the range is told)
_RANGES: dict[str, tuple[float, float, bool, str]] = {
    "temperature": (0.0, math.inf, True, "0 or more"),
    "top_p": (0.0, 1.0, False, "in (0, 1]"),
    "min_p": (0.0, 1.0, True, "in [0, 1]"),
    "typical_p": (0.0, 1.0, False, "in (0, 1]"),
    "repetition_penalty": (0.0, math.inf, False, "above 0"),
    "presence_penalty": (-2.0, 2.0, True, "in [-2, 2]"),
    "frequency_penalty": (-2.0, 2.0, True, "in [-2, 2]"),
}
_ABSENT_IS_DEFAULT = frozenset({"temperature", "top_p", "typical_p", "repetition_penalty"})


def check_sampling(sampling: common_pb2.SamplingParams, vocab_size: int, max_logprobs: int = MAX_LOGPROBS) -> None:
    """Raises InvalidRequest that names the first field out of its range."""
    for name, (lowest, highest, inclusive, told) in _RANGES.items():
        if name in _ABSENT_IS_DEFAULT and not sampling.HasField(name):
            continue
        value = getattr(sampling, name)
        above = value >= lowest if inclusive else value > lowest
        if not (math.isfinite(value) and above and value <= highest):
            raise InvalidRequest(f"{name} must be {told}, not {value:g}", param=name)
    if sampling.top_k < -1:
        raise InvalidRequest(f"top_k must be 0 (off) or more, not {sampling.top_k}", param="top_k")
    if sampling.HasField("logprobs") and sampling.logprobs > max_logprobs:
        told = f"log probabilities of at most {max_logprobs} tokens are told for one (--max-logprobs)"
        raise InvalidRequest(f"{told}, not of {sampling.logprobs}", param="logprobs")
    _check_stop(sampling)
    _check_bad_words(sampling)
    _check_ids(sampling, vocab_size)


def _check_stop(sampling: common_pb2.SamplingParams) -> None:
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings are allowed", param="stop")
    if any(not s or len(s) > MAX_STOP_LENGTH for s in sampling.stop):
        raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters", param="stop")


def _check_bad_words(sampling: common_pb2.SamplingParams) -> None:
    if len(sampling.bad_words) > MAX_BAD_WORDS:
        raise InvalidRequest(f"at most {MAX_BAD_WORDS} bad_words are allowed", param="bad_words")
    if any(not word.strip() or len(word) > MAX_BAD_WORD_LENGTH for word in sampling.bad_words):
        told = f"each of bad_words must have 1 to {MAX_BAD_WORD_LENGTH} characters, not all of them spaces"
        raise InvalidRequest(told, param="bad_words")


def _check_ids(sampling: common_pb2.SamplingParams, vocab_size: int) -> None:
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids are allowed", param="stop_token_ids")
    if any(i >= vocab_size for i in sampling.stop_token_ids):
        raise InvalidRequest(f"stop_token_ids must be below {vocab_size}", param="stop_token_ids")
    if len(sampling.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
        raise InvalidRequest(f"at most {MAX_LOGPROB_TOKEN_IDS} logprob_token_ids are allowed", "logprob_token_ids")
    for name in ("allowed_token_ids", "logprob_token_ids"):
        if any(i >= vocab_size for i in getattr(sampling, name)):
            raise InvalidRequest(f"{name} must be below {vocab_size}", param=name)
    for token_id, bias in sampling.logit_bias.items():
        if token_id >= vocab_size:
            raise InvalidRequest(f"logit_bias: token ids must be below {vocab_size}", param="logit_bias")
        if not -100 <= bias <= 100:
            raise InvalidRequest(f"logit_bias must be in [-100, 100], not {bias:g}", param="logit_bias")
