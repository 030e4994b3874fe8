"""How tokens are chosen where a request does not say: the model's own generation_config.json, as in vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from pagewire.v1 import common_pb2
from pagewire_core.errors import InvalidRequest, StartupError
from pagewire_core.model_dir import ModelDir, read_json

from pagewire_router.sampling_limits import check_sampling

log = structlog.get_logger(__name__)

FILE = "generation_config.json"
_WHOLE = ("top_k", "max_new_tokens")
_NAMES = ("temperature", "top_p", "min_p", "repetition_penalty", *_WHOLE)
_UINT32_MAX = 2**32 - 1


@dataclass(frozen=True)
class SamplingDefaults:
    """values: of SamplingParams, by name. max_tokens: of an answer that may fill the context. most_tokens: that anybody
    may ask for.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    most_tokens: int | None = None

    def fill(self, sampling: common_pb2.SamplingParams) -> None:
        """Sets what is not said."""
        for name, value in self.values.items():
            if not sampling.HasField(name):  # type: ignore[arg-type]
                setattr(sampling, name, value)


def with_generation_config(model: ModelDir, source: str) -> ModelDir:
    """The model with the file of the folder `source`, unless that is `auto` or `vllm`. Raises StartupError."""
    if source in ("auto", "vllm"):
        return model
    file = Path(source).expanduser() / FILE
    if not file.is_file():
        raise StartupError(f"--generation-config {source}: there is no {FILE}; give its folder, auto or vllm")
    return replace(model, generation_config=read_json(file, {}))


def load_sampling_defaults(model: ModelDir, source: str = "auto", override: str | None = None) -> SamplingDefaults:
    """source and override: --generation-config and --override-generation-config.

    What the file says beside these names is no default of sampling; null says nothing. Raises StartupError.
    """
    said = {} if source == "vllm" else {name: model.generation_config.get(name) for name in _NAMES}
    replaced = _parsed(override) if override else {}
    found = {name: value for name, value in {**said, **replaced}.items() if value is not None}
    for name, value in found.items():
        _check(name, value, "--override-generation-config" if name in replaced else FILE)
    max_tokens = found.pop("max_new_tokens", None)
    # As in vLLM: what the operator names himself holds for all, what comes with a model for those who do not say.
    most_tokens = replaced.get("max_new_tokens") if source in ("auto", "vllm") else max_tokens
    return SamplingDefaults(found, max_tokens, most_tokens)


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise StartupError('--override-generation-config is no JSON object; write {"temperature": 0.6}')
    if unknown := sorted(value.keys() - set(_NAMES)):
        raise StartupError(f"--override-generation-config: {unknown[0]} is none of {', '.join(_NAMES)}")
    return value


def _check(name: str, value: object, source: str) -> None:
    kind: type | tuple[type, ...] = int if name in _WHOLE else (int, float)
    right = isinstance(value, kind) and not isinstance(value, bool)
    if right and name == "max_new_tokens":
        right = 0 < value <= _UINT32_MAX  # type: ignore[operator]
    elif right:
        try:
            check_sampling(common_pb2.SamplingParams(**{name: value}), 0)  # type: ignore[arg-type]
        except (InvalidRequest, ValueError):
            right = False
    if not right:
        raise StartupError(f"{source}: {name} cannot be {value!r}; see --override-generation-config")


def tell(defaults: SamplingDefaults) -> None:
    """A line in the log where the defaults are not OpenAI's: which are in force."""
    told = {**defaults.values}
    for name, tokens in (("max_tokens", defaults.max_tokens), ("most_tokens", defaults.most_tokens)):
        told |= {name: tokens} if tokens else {}
    if told:
        log.warning("sampling defaults are the model's, not OpenAI's; --generation-config vllm has those", **told)
