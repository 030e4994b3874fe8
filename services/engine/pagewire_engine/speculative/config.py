"""--speculative-config and --speculate: which drafts, and how many tokens of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pagewire_core.errors import StartupError

METHODS = ("ngram", "draft_model")
_FLAG = "--speculative-config"
_KEYS: dict[str, type] = {
    "method": str, "model": str, "revision": str, "num_speculative_tokens": int, "prompt_lookup_max": int,
    "prompt_lookup_min": int, "disable_by_batch_size": int,
}  # fmt: skip
_KEYS_OF = {
    "ngram": frozenset(_KEYS) - {"model", "revision"},
    "draft_model": frozenset(_KEYS) - {"prompt_lookup_max", "prompt_lookup_min"},
}
_DEFAULT_LOOKUP = 5  # vLLM's, for both ends, if neither is given


@dataclass(frozen=True)
class SpeculativeConfig:
    """At most `num_speculative_tokens` draft tokens for a sequence in a step.

    ngram: what followed the latest earlier occurrence of the last prompt_lookup_max tokens, or of fewer,
    down to prompt_lookup_min. draft_model: what the model `model` would say. With more than
    `disable_by_batch_size` decoding sequences there are no drafts.
    """

    method: str
    num_speculative_tokens: int
    prompt_lookup_max: int = _DEFAULT_LOOKUP
    prompt_lookup_min: int = _DEFAULT_LOOKUP
    model: str | None = None
    revision: str | None = None
    disable_by_batch_size: int | None = None


def read_speculative_config(text: str | None, speculate: int | None) -> SpeculativeConfig | None:
    """What the two flags ask for; None if neither is given. Raises StartupError.

    `text`: vLLM's JSON object. `speculate`: TGI's number of n-gram draft tokens; it names no lengths, so
    short matches count too and the acceptance that follows decides how often they are used.
    """
    if text is not None and speculate is not None:
        raise StartupError(f"{_FLAG} and --speculate contradict each other; give one of them")
    if speculate is not None:
        return SpeculativeConfig("ngram", speculate, prompt_lookup_min=2)
    return None if text is None else _from_json(text)


def _from_json(text: str) -> SpeculativeConfig:
    given = _object(text)
    for key, value in given.items():
        _check(key, value)
    if given.get("model") in ("ngram", "[ngram]") and "method" not in given:  # older spellings of the method
        del given["model"]
        given["method"] = "ngram"
    method = given.pop("method", None) or ("draft_model" if "model" in given else None)
    if method not in METHODS:
        asked = "names no method" if method is None else f"asks for method {method!r}"
        raise StartupError(f"{_FLAG} {asked}; supported are {' and '.join(METHODS)}")
    if foreign := sorted(given.keys() - _KEYS_OF[method]):
        raise StartupError(f"{_FLAG}: {foreign[0]!r} has no meaning for method {method!r}; leave it out")
    if "num_speculative_tokens" not in given:
        raise StartupError(f"{_FLAG} lacks num_speculative_tokens; a number from 2 to 5 is a good start")
    if method == "draft_model" and "model" not in given:
        raise StartupError(f"{_FLAG}: method 'draft_model' needs model, a local directory or a Hub id")
    return SpeculativeConfig(method, **(given | (_lookup(given) if method == "ngram" else {})))


def _object(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise StartupError(f"{_FLAG} is not JSON ({error}); write it in single quotes, keys in double ones") from None
    if not isinstance(given, dict):
        raise StartupError(f"{_FLAG} must be a JSON object, not {type(given).__name__}")
    return {key: value for key, value in given.items() if value is not None}


def _check(key: str, value: object) -> None:
    expected = _KEYS.get(key)
    if expected is None:
        raise StartupError(f"{_FLAG}: unknown key {key!r}; known are {', '.join(_KEYS)}")
    if type(value) is not expected:
        noun = "a string" if expected is str else "an integer"
        raise StartupError(f"{_FLAG}: {key} must be {noun}, not {value!r}")
    if isinstance(value, int) and value < 1:
        raise StartupError(f"{_FLAG}: {key} must be positive, not {value}")


def _lookup(given: dict[str, Any]) -> dict[str, int]:
    """Both ends; one that is given alone is the other too, as in vLLM."""
    largest = given.get("prompt_lookup_max", given.get("prompt_lookup_min", _DEFAULT_LOOKUP))
    smallest = given.get("prompt_lookup_min", largest)
    if smallest > largest:
        raise StartupError(f"{_FLAG}: prompt_lookup_min {smallest} is more than prompt_lookup_max {largest}")
    return {"prompt_lookup_max": largest, "prompt_lookup_min": smallest}
