"""What clients ask, in the log: only where the operator has said so, as prompts are private."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from pagewire.v1 import inference_pb2
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.request import ValidRequest

log = structlog.get_logger(__name__)

_OURS = ("constraint", "eos_token_ids", "bad_tokens")  # of sampling parameters: what the router has put there
_MOST_BYTES = 4  # of a character, and with it the tokens


class RequestLog:
    """max_len: characters and token ids of a prompt that are shown, at most; None: all."""

    def __init__(self, tokenizer: Tokenizer, max_len: int | None) -> None:
        self._tokenizer, self._max_len = tokenizer, max_len

    def generate(self, valid: ValidRequest, asked: inference_pb2.GenerateRequest) -> None:
        """A request that has been found valid: its parameters are complete, with every default."""
        params = {"n": valid.n, **_fields(valid.sampling)}
        for name in _OURS:
            params.pop(name, None)
        if valid.length_penalty is not None:
            params["beam_search"] = {"length_penalty": valid.length_penalty}
        if asked.HasField("structured_output"):
            params["structured_output"] = str(_fields(asked.structured_output))[: self._max_len]
        self._write(valid.request_id, valid.tenant, params, valid.prompt_ids)

    def embed(self, request_id: str, tenant: str, inputs: Sequence[list[int]]) -> None:
        for ids in inputs:
            self._write(request_id, tenant, {}, ids)

    def _write(self, request_id: str, tenant: str, params: dict[str, Any], ids: list[int]) -> None:
        """The prompt is what the model is given: with its template, as far as it was not cut."""
        most = self._max_len
        shown = ids if most is None else ids[: most * _MOST_BYTES]
        log.info(
            "request received",
            request_id=request_id,
            tenant=tenant,
            params=params,
            prompt=self._tokenizer.decode(shown, skip_special_tokens=False)[:most],
            prompt_token_ids=ids[:most],
            num_prompt_tokens=len(ids),
        )


def _fields(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)
