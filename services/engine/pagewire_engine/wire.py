"""Sampled tokens and scores between the engine's form and the contract's."""

from __future__ import annotations

from pagewire.v1 import common_pb2 as pb

from pagewire_engine.events import PromptScores
from pagewire_engine.sampler import Sampled


def to_proto(sampled: Sampled) -> pb.SampledToken:
    message = pb.SampledToken(token_id=sampled.token)
    if sampled.logprob is not None:
        message.logprob = sampled.logprob
        message.top.extend(pb.TokenLogprob(token_id=token, logprob=value) for token, value in sampled.top)
    return message


def from_proto(message: pb.SampledToken, with_logprob: bool) -> Sampled:
    if not with_logprob:
        return Sampled(message.token_id)
    return Sampled(message.token_id, message.logprob, tuple((t.token_id, t.logprob) for t in message.top))


def scores_to_proto(told: PromptScores) -> pb.PromptLogprobs:
    scores = told.scores
    return pb.PromptLogprobs(
        begin=told.begin,
        logprobs=scores.logprobs.tolist(),
        ranks=scores.ranks.tolist(),
        num_top=scores.top_ids.shape[1],
        top_ids=scores.top_ids.ravel().tolist(),
        top_logprobs=scores.top_logprobs.ravel().tolist(),
    )
