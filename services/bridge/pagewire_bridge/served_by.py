"""Proof of what a request cached, computed and moved, as headers."""

from __future__ import annotations

from collections.abc import Sequence

from pagewire.v1.inference_pb2 import Summary


def served_by(summaries: Sequence[Summary]) -> dict[str, str]:
    """Headers that say who served an answer and what moved between the workers."""

    def names(values: Sequence[str]) -> str:
        return ",".join(dict.fromkeys(value for value in values if value))

    return {
        "x-pagewire-prefill-worker": names([s.prefill_worker for s in summaries]),
        "x-pagewire-decode-worker": names([s.decode_worker for s in summaries]),
        "x-pagewire-cached-tokens": str(sum(s.cached_tokens for s in summaries)),
        "x-pagewire-computed-tokens": str(sum(s.computed_tokens for s in summaries)),
        "x-pagewire-transferred-tokens": str(sum(s.transferred_tokens for s in summaries)),
        "x-pagewire-transferred-bytes": str(sum(s.transferred_bytes for s in summaries)),
        "x-pagewire-lane": names([s.lane for s in summaries]),
    }
