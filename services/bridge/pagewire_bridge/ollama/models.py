"""A served model as Ollama describes models."""

from __future__ import annotations

from typing import Any

from pagewire.v1.inference_pb2 import Model

from pagewire_bridge.timestamps import rfc3339

_FOREVER = "2318-01-01T00:00:00Z"  # a served model stays loaded
_QUANTIZATION = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def tag(name: str) -> str:
    """Names carry a tag; `latest` if they say none. A colon before a slash belongs to a host."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def details(model: Model) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": model.architecture,
        "families": [model.architecture],
        "parameter_size": _parameter_size(model.parameter_count),
        "quantization_level": _QUANTIZATION.get(model.dtype, model.dtype.upper()),
    }


def in_list(model: Model) -> dict[str, Any]:
    """An entry of /api/tags."""
    return {
        **_named(model),
        "modified_at": rfc3339(model.created),
        "size": model.weight_bytes,
        "digest": model.digest.hex(),
        "details": details(model),
        "capabilities": capabilities(model),
    }


def running(model: Model) -> dict[str, Any]:
    """An entry of /api/ps."""
    return {
        **_named(model),
        "size": model.weight_bytes,
        "digest": model.digest.hex(),
        "details": details(model),
        "expires_at": _FOREVER,
        "size_vram": 0,
        "context_length": model.max_model_len,
    }


def shown(model: Model) -> dict[str, Any]:
    """The answer of /api/show."""
    architecture = model.architecture
    return {
        "modelfile": f"FROM {model.root}\n",
        "parameters": "",
        "template": "",
        "license": "",
        "modified_at": rfc3339(model.created),
        "details": details(model),
        "model_info": {
            "general.architecture": architecture,
            "general.parameter_count": model.parameter_count,
            f"{architecture}.context_length": model.max_model_len,
            f"{architecture}.embedding_length": model.hidden_size,
            f"{architecture}.vocab_size": model.vocab_size,
        },
        "capabilities": capabilities(model),
    }


def capabilities(model: Model) -> list[str]:
    return ["completion", "embedding", *(["tools"] if model.is_chat else [])]


def _named(model: Model) -> dict[str, str]:
    name = tag(model.name)
    return {"name": name, "model": name}


def _parameter_size(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
