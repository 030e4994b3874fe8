"""What a beam search may ask for; the one place that refuses one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pagewire.v1 import inference_pb2
from pagewire_core.errors import InvalidRequest

_MAX_PENALTY = 10.0  # either way: with a context of a million tokens, far from where powers overflow
# Of SamplingParams, what changes which tokens may come, or ends a text: vLLM ignores it, and gives another answer than
# was asked for. What only says how to draw one (temperature, top_p, seed, ...) has nothing to say here.
_REFUSED = (
    "stop", "stop_token_ids", "min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "logprob_token_ids",
    "presence_penalty", "frequency_penalty", "watermark",
)  # fmt: skip
_REFUSED_UNLESS_ONE: tuple[Literal["repetition_penalty", "typical_p"], ...] = ("repetition_penalty", "typical_p")


def length_penalty_of(request: inference_pb2.GenerateRequest, max_logprobs: int) -> float | None:
    """Of a beam search; None: it is none. max_logprobs: how many may be told of a token.

    Raises InvalidRequest that names the first field at fault.
    """
    if not request.HasField("beam_search"):
        return None
    if 2 * request.n > max_logprobs:
        most = f"n must be at most {max_logprobs // 2}, half of --max-logprobs"
        raise InvalidRequest(f"a beam search looks at the 2n likeliest tokens after each of n beams: {most}", param="n")
    search = request.beam_search
    penalty = search.length_penalty if search.HasField("length_penalty") else 1.0
    if not -_MAX_PENALTY <= penalty <= _MAX_PENALTY:
        told = f"length_penalty must be in [-{_MAX_PENALTY:g}, {_MAX_PENALTY:g}], not {penalty:g}"
        raise InvalidRequest(told, param="length_penalty")
    for name in _refused(request):
        raise InvalidRequest(f"{name} is not supported with beam search", param=name)
    return penalty


def _refused(request: inference_pb2.GenerateRequest) -> Iterator[str]:
    sampling = request.sampling
    yield from (name for name in _REFUSED if getattr(sampling, name))
    for name in _REFUSED_UNLESS_ONE:
        if sampling.HasField(name) and getattr(sampling, name) != 1:
            yield name
    if request.HasField("structured_output"):
        yield "structured_outputs"
    if request.reasoning.HasField("max_tokens"):
        yield "thinking_token_budget"
    if request.HasField("prompt_logprobs"):
        yield "prompt_logprobs"
    if request.prompt_only:
        yield "prompt_only"
