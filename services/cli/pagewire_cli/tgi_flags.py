"""Flags and environment variables of TGI's launcher, as those of `pagewire serve`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from pagewire_core.errors import StartupError

# TGI's name -> ours, where the value is meant in the same way.
_RENAMED = {
    "model-id": "model",
    "hostname": "host",
    "port": "port",
    "revision": "revision",
    "dtype": "dtype",
    "num-shard": "tensor-parallel-size",
    "speculate": "speculate",
    "max-input-tokens": "max-input-tokens",
    "max-input-length": "max-input-tokens",
    "max-total-tokens": "max-model-len",
    "max-batch-prefill-tokens": "max-num-batched-tokens",
    "max-batch-size": "max-num-seqs",
    "max-concurrent-requests": "max-queued-requests",
    "cuda-memory-fraction": "gpu-memory-utilization",
    "kv-cache-dtype": "kv-cache-dtype",
    "huggingface-hub-cache": "download-dir",
    "api-key": "api-key",
    "graceful-termination-timeout": "graceful-termination-timeout",
    "otlp-endpoint": "otlp-traces-endpoint",
    "otlp-service-name": "otlp-service-name",
}
_QUANTIZE = {
    "bitsandbytes": "int8", "eetq": "int8", "bitsandbytes-nf4": "int4", "bitsandbytes-fp4": "int4", "fp8": "fp8",
    "int8": "int8", "int4": "int4",
}  # fmt: skip
_KV_CACHE_DTYPES = {"fp8_e4m3fn": "fp8_e4m3"}
_SHORT = {"-p": "port", "-e": "env"}
_SWITCHES = frozenset({
    "json-output", "disable-custom-kernels", "disable-grammar-support", "enable-prefill-logprobs",
    "trust-remote-code", "env", "watermark",
})  # fmt: skip
# What says how TGI works inside, or sets limits that are fixed here.
_WITHOUT_EFFECT = frozenset({
    "sharded", "validation-workers", "max-best-of", "max-stop-sequences", "max-top-n-tokens", "waiting-served-ratio",
    "max-batch-total-tokens", "max-waiting-tokens", "cuda-graphs", "shard-uds-path", "master-addr", "master-port",
    "weights-cache-override", "disable-custom-kernels", "prometheus-port", "max-client-batch-size", "usage-stats",
    "payload-limit", "disable-grammar-support", "enable-prefill-logprobs", "trust-remote-code",
})  # fmt: skip
_UNSUPPORTED = frozenset({
    "lora-adapters", "rope-scaling", "rope-factor", "tokenizer-config-path", "watermark-gamma", "watermark-delta",
})  # fmt: skip
_KNOWN = frozenset({*_RENAMED, *_SWITCHES, *_WITHOUT_EFFECT, *_UNSUPPORTED, "quantize", "cors-allow-origin"})
_NOT_FROM_ENVIRONMENT = frozenset({"hostname", "env"})  # containers have a HOSTNAME of their own
_OFF = ("", "0", "false", "no", "off")


def is_meant(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether somebody speaks to TGI: its model has a name of its own."""
    return "MODEL_ID" in environ or any(a.partition("=")[0] == "--model-id" for a in arguments)


def translated(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Arguments of `pagewire serve`, and the flags without effect. What TGI does not know is passed on as it is.

    Raises StartupError for what is not supported.
    """
    given, rest = _read(arguments)
    for name in sorted(_KNOWN - _NOT_FROM_ENVIRONMENT):
        variable = name.upper().replace("-", "_")
        if variable in environ and name not in given:
            given[name] = [environ[variable]]
    ours: list[str] = []
    for name, values in given.items():
        if name in _SWITCHES and values[-1].lower() in _OFF:
            continue
        ours += _ours(name, values)
    return [*ours, *rest], sorted(f"--{name}" for name in given.keys() & _WITHOUT_EFFECT)


def _read(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """TGI's flags with their values, and all else."""
    given: dict[str, list[str]] = {}
    rest: list[str] = []
    left: Iterator[str] = iter(arguments)
    for argument in left:
        flag, has_value, value = argument.partition("=")
        name = _SHORT.get(flag, flag.removeprefix("--"))
        if not (flag.startswith("--") or flag in _SHORT) or name not in _KNOWN:
            rest.append(argument)
            continue
        if not has_value:
            value = "true" if name in _SWITCHES else next(left, "")
        given.setdefault(name, []).append(value)
    return given, rest


def _ours(name: str, values: Sequence[str]) -> list[str]:
    value = values[-1]
    if name in _UNSUPPORTED:
        raise StartupError(f"--{name} is not supported")
    if name == "quantize":
        if value not in _QUANTIZE:
            raise StartupError(f"--quantize {value} is not supported; choose from {', '.join(_QUANTIZE)}")
        return [f"--quantization={_QUANTIZE[value]}"]
    if name == "cors-allow-origin":
        origins = [origin for v in values for origin in v.split(",") if origin]
        return [f"--allowed-origins={json.dumps(origins)}"]
    if name == "kv-cache-dtype":
        return [f"--kv-cache-dtype={_KV_CACHE_DTYPES.get(value, value)}"]
    if name == "json-output":
        return ["--log-format=json"]
    return [f"--{_RENAMED[name]}={value}"] if name in _RENAMED else []
