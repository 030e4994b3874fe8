"""The headers of requests and responses that the document names."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "The id of the request in answers and in every log: 1 to 128 letters, digits or ._:@/+=- "
    "characters. Anything else is as good as none, and an id is made.",
    "schema": {"type": "string"},
}

SERVED_BY = (
    "x-pagewire-prefill-worker", "x-pagewire-decode-worker", "x-pagewire-cached-tokens", "x-pagewire-computed-tokens",
    "x-pagewire-transferred-tokens", "x-pagewire-transferred-bytes", "x-pagewire-lane",
)  # fmt: skip
ANTHROPIC_ID = "request-id"
IGNORED_FIELDS = "x-pagewire-ignored-fields"
PROMPT_TRUNCATED = "x-pagewire-prompt-truncated"
TIMINGS = (
    "x-compute-type", "x-compute-time", "x-compute-characters", "x-total-time", "x-validation-time", "x-queue-time",
    "x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-generated-tokens",
)  # fmt: skip
RATE_LIMITS = tuple(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)

_COUNT: Schema = {"type": "string", "pattern": "^[0-9]+$"}
_TEXT: Schema = {"type": "string"}

# Name -> description and schema. Those of whole answers alone are absent from streams.
HEADERS: dict[str, tuple[str, Schema]] = {
    "x-request-id": ("The id of the request: the client's own, or the one made for it.", _TEXT),
    ANTHROPIC_ID: ("The same by the name by which Anthropic's clients know it.", _TEXT),
    "retry-after": ("Seconds after which it is worth trying again.", _COUNT),
    "x-pagewire-prefill-worker": ("Whole answers: who computed the prompt.", _TEXT),
    "x-pagewire-decode-worker": ("Whole answers: who generated.", _TEXT),
    "x-pagewire-cached-tokens": ("Whole answers: tokens of the prompt that were in a cache.", _COUNT),
    "x-pagewire-computed-tokens": ("Whole answers: tokens of the prompt that were computed.", _COUNT),
    "x-pagewire-transferred-tokens": ("Whole answers: tokens whose KV moved between workers.", _COUNT),
    "x-pagewire-transferred-bytes": ("Whole answers: bytes of KV that moved between workers.", _COUNT),
    "x-pagewire-lane": ("Whole answers: what the KV moved over.", _TEXT),
    IGNORED_FIELDS: ("Fields of the request that had no effect; absent if there were none.", _TEXT),
    PROMPT_TRUNCATED: ("Tokens that were cut from a prompt that did not fit; absent if it did.", _COUNT),
    "x-compute-type": ("Whole answers: always pagewire.", _TEXT),
    "x-compute-time": ("Whole answers: seconds in all.", _TEXT),
    "x-compute-characters": ("Whole answers: characters of the prompt.", _COUNT),
    "x-total-time": ("Whole answers: milliseconds in all.", _COUNT),
    "x-validation-time": ("Whole answers: milliseconds before the queue.", _COUNT),
    "x-queue-time": ("Whole answers: milliseconds in the queue.", _COUNT),
    "x-inference-time": ("Whole answers: milliseconds after the queue.", _COUNT),
    "x-time-per-token": ("Whole answers: milliseconds for each generated token.", _COUNT),
    "x-prompt-tokens": ("Whole answers: tokens of the prompt.", _COUNT),
    "x-generated-tokens": ("Whole answers: tokens that were generated.", _COUNT),
    **{name: ("The standing of the API key; absent without that limit.", _TEXT) for name in RATE_LIMITS},
}


def to_components() -> dict[str, Any]:
    return {name: {"description": text, "schema": schema} for name, (text, schema) in HEADERS.items()}


def refer(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
