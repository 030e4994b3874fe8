"""The model that a router serves: names, text in both directions, limits."""

from __future__ import annotations

import functools
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pagewire.v1 import inference_pb2
from pagewire_core.chat_template import ChatTemplate, load_chat_template, special_texts
from pagewire_core.errors import InvalidRequest, StartupError
from pagewire_core.model_dir import ModelDir, locate, read_json, resolve_model
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.chat import template_kwargs
from pagewire_router.sampling_defaults import SamplingDefaults, load_sampling_defaults, with_generation_config
from pagewire_router.sampling_limits import MAX_LOGPROBS


def _any_seed() -> int:
    return secrets.randbits(63)


@dataclass(frozen=True)
class ServedModel:
    names: tuple[str, ...]  # what clients may ask for; the first is the one told
    root: str
    digest: bytes
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    description: inference_pb2.Model = field(default_factory=inference_pb2.Model)  # without name and readiness
    own_eos_token_ids: tuple[int, ...] = ()  # by its own files, which are what workers read
    max_input_tokens: int | None = None  # a prompt may have no more, whatever the context
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    max_logprobs: int = MAX_LOGPROBS
    draw_seed: Callable[[], int] = _any_seed  # of a request that has none
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # where a chat does not say
    special_texts: tuple[str, str] = ("", "")  # beginning and end of a sequence, as templates name them
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)  # its file


def load_served_model(
    model: str,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    download_dir: str | None = None,
    served_names: str | None = None,
    chat_template: str | None = None,
    default_chat_template_kwargs: str | None = None,
    max_input_tokens: int | None = None,
    generation_config: str = "auto",
    override_generation_config: str | None = None,
    max_logprobs: int = MAX_LOGPROBS,
    seed: int | None = None,
) -> ServedModel:
    """Reads everything a router needs of a model. `served_names` is comma-separated. Raises StartupError.

    seed: of the generator that draws the seeds of requests without one; None: they are never the same twice.
    """
    own = resolve_model(model, revision, download_dir)
    model_dir = with_generation_config(own, generation_config)
    text_dir = locate(tokenizer, None, download_dir) if tokenizer else model_dir.path
    codec = Tokenizer(text_dir)
    names = tuple(n.strip() for n in (served_names or "").split(",") if n.strip())
    template = load_chat_template(text_dir, chat_template)
    return ServedModel(
        names=names or (model,),
        root=model,
        digest=model_dir.digest(),
        max_model_len=model_dir.max_model_len,
        vocab_size=int(model_dir.config.get("vocab_size") or codec.vocab_size),
        eos_token_ids=model_dir.eos_token_ids,
        own_eos_token_ids=own.eos_token_ids,
        tokenizer=codec,
        chat_template=template,
        description=_describe(model_dir, is_chat=template is not None),
        max_input_tokens=max_input_tokens,
        sampling_defaults=load_sampling_defaults(model_dir, generation_config, override_generation_config),
        max_logprobs=max_logprobs,
        draw_seed=_any_seed if seed is None else functools.partial(random.Random(seed).getrandbits, 63),
        template_kwargs=_template_kwargs(default_chat_template_kwargs or ""),
        special_texts=special_texts(text_dir),
        tokenizer_config=read_json(text_dir / "tokenizer_config.json", {}),
    )


def _template_kwargs(text: str) -> dict[str, Any]:
    try:
        return template_kwargs(text)
    except InvalidRequest as error:
        raise StartupError(f"--default-chat-template-kwargs: {error.message}") from None


def _describe(model: ModelDir, is_chat: bool) -> inference_pb2.Model:
    config = model.config
    return inference_pb2.Model(
        root=model.name,
        created=int(time.time()),
        is_chat=is_chat,
        architecture=str(config.get("model_type", "")),
        parameter_count=model.num_parameters,
        weight_bytes=model.weight_bytes,
        digest=model.digest(),
        hidden_size=int(config.get("hidden_size") or 0),
        vocab_size=int(config.get("vocab_size") or 0),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
    )
