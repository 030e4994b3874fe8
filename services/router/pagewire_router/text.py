"""Text and tokens for clients that ask for them alone: pure functions over the served model."""

from __future__ import annotations

import json

from pagewire.v1 import inference_pb2
from pagewire_core.errors import InvalidRequest

from pagewire_router.chat import render
from pagewire_router.model import ServedModel
from pagewire_router.request import check_model

_MAX_TEXT = 1 << 20
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # what any tokenizer.json is one of


def tokenize(
    request: inference_pb2.TokenizeRequest, model: ServedModel, rendered: str | None = None
) -> inference_pb2.TokenizeResponse:
    """rendered: the text of its chat, if that brought a template of its own.

    Raises ModelNotFound and InvalidRequest as a GenerateRequest with this prompt would.
    """
    check_model(request.model, model)
    if request.WhichOneof("prompt") is None:
        raise InvalidRequest("the request has no prompt: give text or chat")
    is_chat = request.HasField("chat")
    text = request.text if not is_chat else render(request.chat, model.chat_template) if rendered is None else rendered
    if len(text) > _MAX_TEXT:  # this holds up every stream
        param = "messages" if is_chat else "prompt"
        raise InvalidRequest(f"at most {_MAX_TEXT} characters are tokenized at a time", param)
    special = request.add_special_tokens if request.HasField("add_special_tokens") else not is_chat
    response = inference_pb2.TokenizeResponse(text=text)
    for token_id, (begin, end) in model.tokenizer.encode_with_offsets(text, special):
        token = response.tokens.add(id=token_id, bytes=model.tokenizer.token_bytes(token_id))
        if request.with_offsets:
            token.begin, token.end = begin, end
    return response


def detokenize(request: inference_pb2.DetokenizeRequest, model: ServedModel) -> inference_pb2.DetokenizeResponse:
    """Text of all tokens, special ones included. Raises ModelNotFound, InvalidRequest."""
    check_model(request.model, model)
    if any(i >= model.vocab_size for i in request.token_ids):
        raise InvalidRequest(f"token ids must be below the vocabulary size, {model.vocab_size}", param="tokens")
    text = model.tokenizer.decode(request.token_ids, skip_special_tokens=False)
    return inference_pb2.DetokenizeResponse(text=text)


def tokenizer_info(
    request: inference_pb2.TokenizerInfoRequest, model: ServedModel
) -> inference_pb2.TokenizerInfoResponse:
    """The model's own settings, and the template that is served. Raises ModelNotFound."""
    check_model(request.model, model)
    template = model.chat_template.source if model.chat_template is not None else None
    config = {"tokenizer_class": _TOKENIZER_CLASS, **model.tokenizer_config, "chat_template": template}
    return inference_pb2.TokenizerInfoResponse(config_json=json.dumps(config))
