"""Proof of what a request cached, computed and moved: headers of a whole answer, an object at a stream's end."""

from __future__ import annotations

from collections.abc import Sequence

from pagewire.v1.inference_pb2 import Summary


def account(summaries: Sequence[Summary]) -> dict[str, str | int]:
    """Who served an answer and what moved between the workers; sums over its prompts."""

    def names(values: Sequence[str]) -> str:
        return ",".join(dict.fromkeys(value for value in values if value))

    return {
        "prefill_worker": names([s.prefill_worker for s in summaries]),
        "decode_worker": names([s.decode_worker for s in summaries]),
        "cached_tokens": sum(s.cached_tokens for s in summaries),
        "computed_tokens": sum(s.computed_tokens for s in summaries),
        "transferred_tokens": sum(s.transferred_tokens for s in summaries),
        "transferred_bytes": sum(s.transferred_bytes for s in summaries),
        "lane": names([s.lane for s in summaries]),
    }


def served_by(summaries: Sequence[Summary]) -> dict[str, str]:
    """The account as headers, x-pagewire-prefill-worker and so on."""
    return {f"x-pagewire-{name.replace('_', '-')}": str(value) for name, value in account(summaries).items()}
