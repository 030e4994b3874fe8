"""A client's GenerateRequest, checked and tokenized once; nothing after this looks at raw input."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import ContextLength, InvalidRequest, ModelNotFound
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.beam_limits import length_penalty_of
from pagewire_router.chat import render
from pagewire_router.model import ServedModel
from pagewire_router.sampling_defaults import SamplingDefaults
from pagewire_router.sampling_limits import check_sampling

MAX_CHOICES = 128
_TAIL = 64  # characters of the prompt: enough to see whether thoughts are open at its end
MAX_LENGTHS = {"request_id": 256, "tenant": 256, "session_id": 1024, "cache_salt": 1024}  # in characters
_MAX_CUT_TEXT = 1 << 20
_COMPLETION_TOKENS = 16  # what a plain completion gives when it does not say


@dataclass(frozen=True)
class ValidRequest:
    """`sampling` is complete: seed, max_tokens and end-of-sequence ids are set."""

    request_id: str
    model: str
    prompt_ids: list[int]
    sampling: common_pb2.SamplingParams
    n: int
    echo_text: str | None
    cache_salt: bytes
    return_prompt_token_ids: bool
    session_id: str = ""
    prompt_tail: str = ""  # of its text, if it came as text
    tenant: str = ""
    priority: int = 0
    prompt_logprobs: int | None = None  # as in GenerateRequest
    prompt_only: bool = False  # the one token that is made is shown to nobody
    length_penalty: float | None = None  # of a beam search for n choices; None: they are sampled
    is_step: bool = False  # one more token for each beam of a search, which counts and tells it
    prior: tuple[tuple[int, ...], ...] = ()  # of a step, the tokens that each of n beams has
    max_tokens_clipped: bool = False  # to the room in the context

    @property
    def sampling_revision(self) -> int:
        """The least that a worker must know; see InfoResponse."""
        sampling = self.sampling
        if sampling.allowed_token_ids or sampling.bad_tokens or sampling.penalty_window or sampling.logprob_token_ids:
            return 2
        asks = self.prompt_logprobs is not None or sampling.watermark or sampling.HasField("typical_p")
        return 1 if asks else 0

    @property
    def tokens_to_come(self) -> int:
        """For each choice, at most."""
        return self.sampling.max_tokens - max(map(len, self.prior), default=0)

    @property
    def is_one_token(self) -> bool:
        """Whether who computes the prompt has all of the answer."""
        return self.tokens_to_come == 1 and not self.is_step

    @property
    def skip_special_tokens(self) -> bool:
        sampling = self.sampling
        return sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else True

    def ends_choice(self, token_id: int) -> bool:
        """Whether sampling this token ends a choice (the worker bans it before min_tokens)."""
        return token_id in self._ending_ids

    @cached_property
    def _ending_ids(self) -> frozenset[int]:
        sampling = self.sampling
        return frozenset((*sampling.stop_token_ids, *(() if sampling.ignore_eos else sampling.eos_token_ids)))

    @cached_property
    def hides_stop(self) -> bool:
        """Whether the token or string that ends a choice is no part of its text."""
        return not self.sampling.include_stop_str_in_output

    @cached_property
    def wants_logprobs(self) -> bool:
        return self.sampling.HasField("logprobs")


def validate(
    request: inference_pb2.GenerateRequest, model: ServedModel, max_model_len: int, rendered: str | None = None
) -> ValidRequest:
    """Checks a request against a model and the longest context that the workers allow, in tokens.

    rendered: the text of its chat, if that brought a template of its own.
    Raises ModelNotFound, InvalidRequest, and ContextLength if prompt and output cannot fit.
    """
    check_model(request.model, model)
    n = request.n or 1
    if n > MAX_CHOICES:
        raise InvalidRequest(f"n must be at most {MAX_CHOICES}, not {n}", param="n")
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    length_penalty = length_penalty_of(request, model.max_logprobs)
    if request.model_sampling_defaults and length_penalty is None:
        model.sampling_defaults.fill(sampling)
    check_sampling(sampling, model.vocab_size, model.max_logprobs)
    if request.prompt_logprobs > model.max_logprobs:
        raise InvalidRequest(
            f"prompt_logprobs must be at most {model.max_logprobs} (--max-logprobs), not {request.prompt_logprobs}",
            param="prompt_logprobs",
        )
    for name, longest in MAX_LENGTHS.items():
        if len(getattr(request, name)) > longest:
            raise InvalidRequest(f"{name} must have at most {longest} characters", param=name)
    prompt_ids, text = _cut(request, model, max_model_len, *_prompt(request, model, max_model_len, rendered))
    if not prompt_ids:
        raise InvalidRequest("the prompt is empty: it must have at least one token", param=_prompt_field(request))
    if model.max_input_tokens and len(prompt_ids) > model.max_input_tokens:
        raise ContextLength(
            f"The prompt has {len(prompt_ids)} tokens; this server takes at most {model.max_input_tokens}. Shorten it.",
            param=_prompt_field(request),
        )
    sampling.max_tokens = _max_tokens(request, model, len(prompt_ids), max_model_len)
    if request.prompt_only:
        sampling.max_tokens, sampling.min_tokens = 1, 0
        del sampling.stop[:]
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens ({sampling.min_tokens}) must not be above max_tokens ({sampling.max_tokens})",
            param="min_tokens",
        )
    if not sampling.HasField("seed"):
        sampling.seed = model.draw_seed()
    del sampling.eos_token_ids[:]
    sampling.eos_token_ids.extend(model.eos_token_ids)
    del sampling.bad_tokens[:]
    sampling.bad_tokens.extend(_bad_tokens(sampling.bad_words, model.tokenizer))
    return ValidRequest(
        request_id=request.request_id or uuid.uuid4().hex,
        model=request.model or model.names[0],
        prompt_ids=prompt_ids,
        sampling=sampling,
        n=n,
        echo_text=_echo(request, model, prompt_ids, text),
        cache_salt=request.cache_salt.encode(),
        return_prompt_token_ids=request.return_prompt_token_ids,
        session_id=request.session_id,
        prompt_tail=(text or "")[-_TAIL:],
        tenant=request.tenant,
        priority=request.priority,
        prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
        prompt_only=request.prompt_only,
        length_penalty=length_penalty,
        max_tokens_clipped=request.clip_max_tokens
        and request.sampling.max_tokens > sampling.max_tokens == max_model_len - len(prompt_ids),
    )


def check_model(name: str, model: ServedModel) -> None:
    """Raises ModelNotFound; an empty name is the only model's."""
    if name and name not in model.names:
        raise ModelNotFound(f"The model `{name}` does not exist.", param="model")


def _bad_tokens(words: Iterable[str], tokenizer: Tokenizer) -> list[common_pb2.TokenSequence]:
    """How words are written: at the beginning of a text, and after a space, which is part of a token in many models."""
    forms = (form for word in words for form in (word.lstrip(), " " + word.lstrip()))
    sequences = dict.fromkeys(tuple(tokenizer.encode(form, False)) for form in forms)
    return [common_pb2.TokenSequence(ids=ids) for ids in sequences if ids]


def _prompt_field(request: inference_pb2.GenerateRequest) -> str:
    return "messages" if request.WhichOneof("prompt") == "chat" else "prompt"


def _prompt(
    request: inference_pb2.GenerateRequest, model: ServedModel, limit: int, rendered: str | None
) -> tuple[list[int], str | None]:
    """Ids of the prompt, and its text unless it came as ids. What cannot have as few tokens as `limit` is not read."""
    kind, may_be_longer = request.WhichOneof("prompt"), bool(request.truncate_prompt_tokens or request.truncate_to_fit)
    if kind == "token_ids":
        if len(request.token_ids.ids) >= limit and not may_be_longer:
            _max_tokens(request, model, len(request.token_ids.ids), limit)
        ids = list(request.token_ids.ids)
        if any(i >= model.vocab_size for i in ids):
            raise InvalidRequest(f"token ids must be below the vocabulary size, {model.vocab_size}", param="prompt")
        return ids, None
    if kind == "chat":
        if len(request.chat.messages) > limit:
            raise ContextLength(f"at most {limit} messages fit this model", param="messages")
        text, special = render(request.chat, model.chat_template) if rendered is None else rendered, False
    elif kind == "text":
        text, special = request.text, True
    else:
        raise InvalidRequest("the request has no prompt: give text, token_ids or chat", param="prompt")
    if request.HasField("add_special_tokens"):
        special = request.add_special_tokens
    at_least = len(text) // model.tokenizer.longest_token
    if at_least >= limit and not may_be_longer:
        raise ContextLength(
            f"This model's maximum context length is {limit} tokens. The prompt has at least {at_least}; shorten it.",
            param=_prompt_field(request),
        )
    if at_least >= limit and len(text) > _MAX_CUT_TEXT:  # this holds up every stream
        raise ContextLength(f"at most {_MAX_CUT_TEXT} characters can be cut to fit", param=_prompt_field(request))
    return model.tokenizer.encode(text, special), text


def _cut(
    request: inference_pb2.GenerateRequest, model: ServedModel, limit: int, ids: list[int], text: str | None
) -> tuple[list[int], str | None]:
    """What is used of a prompt and its text."""
    kept = request.truncate_prompt_tokens or len(ids)
    if request.truncate_to_fit:
        room = max(limit - max(request.sampling.max_tokens, 1), 1)
        kept = min(kept, room, model.max_input_tokens or room)
    if len(ids) <= kept:
        return ids, text
    ids = ids[:kept] if request.keep_first_tokens else ids[-kept:]
    return ids, None if text is None else model.tokenizer.decode(ids, skip_special_tokens=False)


def _max_tokens(request: inference_pb2.GenerateRequest, model: ServedModel, prompt_tokens: int, limit: int) -> int:
    defaults = model.sampling_defaults if request.model_sampling_defaults else SamplingDefaults()
    room, asked = limit - prompt_tokens, request.sampling.max_tokens
    if request.clip_max_tokens and room > 0:
        asked = min(asked, room)
    most = defaults.most_tokens or max(asked, room)
    asked = min(asked, most)
    if room < 1 or asked > room:
        wish = f" and {asked} were asked for" if asked else ""
        raise ContextLength(
            f"This model's maximum context length is {limit} tokens. The prompt has {prompt_tokens} tokens{wish}; "
            "shorten the prompt or ask for fewer tokens.",
            param="max_tokens" if room > 0 else _prompt_field(request),
        )
    if asked:
        return asked
    usual = _COMPLETION_TOKENS if request.completion_default_length else defaults.max_tokens or room
    return min(room, usual, most)


def _echo(
    request: inference_pb2.GenerateRequest, model: ServedModel, prompt_ids: list[int], text: str | None
) -> str | None:
    if not request.echo:
        return None
    return text if text is not None else model.tokenizer.decode(prompt_ids, skip_special_tokens=False)
