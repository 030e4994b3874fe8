"""How tokens of one request are chosen, as the engine reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from pagewire.v1 import common_pb2 as pb

_COLDEST = 1e-5  # colder is greedy, as in vLLM: logits divided by it may not be numbers any more


@dataclass(frozen=True)
class SamplingParams:
    """See SamplingParams in common.proto; every default is resolved and `seed` and `max_tokens` are set."""

    seed: int = 0
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    typical_p: float = 1.0
    watermark: bool = False
    constrained: bool = False  # the output follows a grammar
    allowed_token_ids: frozenset[int] = frozenset()  # empty: all
    bad_tokens: tuple[tuple[int, ...], ...] = ()  # the last of each may not follow the others
    logprob_token_ids: tuple[int, ...] = ()  # whose logprobs are told instead of the best's
    penalty_window: int = 0  # tokens that penalties are over; 0: as each says
    embeds: bool = False  # no token is wanted but the hidden state that it would be chosen from

    @classmethod
    def from_proto(cls, p: pb.SamplingParams) -> SamplingParams:
        temperature = p.temperature if p.HasField("temperature") else 1.0
        return cls(
            seed=p.seed,
            max_tokens=p.max_tokens,
            temperature=temperature if temperature >= _COLDEST else 0.0,
            top_p=p.top_p if p.HasField("top_p") else 1.0,
            top_k=max(p.top_k, 0),
            min_p=p.min_p,
            repetition_penalty=p.repetition_penalty if p.HasField("repetition_penalty") else 1.0,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            logit_bias=dict(p.logit_bias),
            min_tokens=p.min_tokens,
            stop_token_ids=frozenset(p.stop_token_ids),
            eos_token_ids=frozenset(p.eos_token_ids),
            ignore_eos=p.ignore_eos,
            logprobs=p.logprobs if p.HasField("logprobs") else None,
            typical_p=p.typical_p if p.HasField("typical_p") else 1.0,
            watermark=p.watermark,
            constrained=p.HasField("constraint"),
            allowed_token_ids=frozenset(p.allowed_token_ids),
            bad_tokens=tuple(tuple(sequence.ids) for sequence in p.bad_tokens if sequence.ids),
            logprob_token_ids=tuple(dict.fromkeys(p.logprob_token_ids)),  # no more than there are tokens
            penalty_window=p.penalty_window,
        )

    @cached_property
    def masked(self) -> bool:
        """Whether a mask says which tokens may come (masks.py)."""
        return bool(self.constrained or self.allowed_token_ids or self.bad_tokens)

    @cached_property
    def has_penalty(self) -> bool:
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)

    @cached_property
    def changes_logits(self) -> bool:
        """Whether anything but temperature and truncation touches the logits."""
        return bool(self.has_penalty or self.logit_bias or (self.min_tokens and not self.masked) or self.watermark)

    @cached_property
    def needs_sampler(self) -> bool:
        """Whether only `sampler.sample` can choose its tokens."""
        return self.watermark or (self.typical_p < 1 and self.temperature > 0)

    @cached_property
    def needs_logits(self) -> bool:
        """Whether the compiled step is to give its rows' logits and choose nothing."""
        return self.changes_logits or self.needs_sampler or self.logprobs is not None

    @property
    def num_logprobs(self) -> int:
        """Tokens whose log probabilities are told beside the chosen one's."""
        return len(self.logprob_token_ids) or self.logprobs or 0

    @property
    def needs_host_tokens(self) -> bool:
        """Whether a step of this request can only be prepared when all its tokens so far are known on the host."""
        return bool(self.has_penalty or self.min_tokens or self.watermark or self.masked)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end a sequence wherever they come."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids

    def finish(self, token: int, num_output: int) -> tuple[pb.FinishReason, int | None] | None:
        """Whether a sequence ends with `token` as its `num_output`-th: the reason and the id that ended it."""
        if token in self.stop_token_ids:
            return pb.FINISH_REASON_STOP, token
        if token in self.eos_token_ids and not self.ignore_eos:
            return pb.FINISH_REASON_STOP, None
        if num_output >= self.max_tokens:
            return pb.FINISH_REASON_LENGTH, None
        return None

    @property
    def banned_before_min_tokens(self) -> frozenset[int]:
        """Where there is a mask, it bans them: unless nothing else may come."""
        return frozenset() if self.masked else self.ends
