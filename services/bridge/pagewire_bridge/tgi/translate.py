"""TGI's parameters as a GenerateRequest: a pure function."""

from __future__ import annotations

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest

from pagewire_bridge.tgi.schema import GenerateBody, Parameters


def to_request(body: GenerateBody, request_id: str, with_tokens: bool) -> inference_pb2.GenerateRequest:
    """with_tokens: the answer shows each token with its log probability. Raises InvalidRequest."""
    asked = body.asked
    _refuse_unsupported(asked)
    with_logprobs = with_tokens or bool(asked.details) or (asked.best_of or 1) > 1
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        text=body.inputs,
        n=asked.best_of or 1,
        truncate_prompt_tokens=asked.truncate or 0,
        structured_output=asked.grammar.to_proto() if asked.grammar else None,
        prompt_logprobs=0 if asked.details and asked.decoder_input_details else None,
        sampling=common_pb2.SamplingParams(
            temperature=(asked.temperature or 1.0) if asked.samples else 0.0,
            top_p=asked.top_p,
            typical_p=asked.typical_p,
            watermark=bool(asked.watermark),
            top_k=asked.top_k or 0,
            repetition_penalty=asked.repetition_penalty,
            frequency_penalty=asked.frequency_penalty or 0.0,
            seed=asked.seed if asked.samples else None,
            max_tokens=asked.max_new_tokens or 0,
            stop=asked.stop or (),
            include_stop_str_in_output=True,  # TGI's generated_text ends with the stop sequence
            logprobs=(asked.top_n_tokens or 0) if with_logprobs else None,
        ),
    )


def _refuse_unsupported(asked: Parameters) -> None:
    if asked.adapter_id:
        raise InvalidRequest("`adapter_id` is not supported yet", "adapter_id")
