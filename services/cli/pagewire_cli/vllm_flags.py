"""Flags of `vllm serve`: those that pagewire does not have yet, those that may only say what is so anyway, and those
that allow what is not done: that is told.
"""

from __future__ import annotations

import argparse

# Flag -> values; none: it is a switch.
SO_ANYWAY: dict[str, tuple[str, ...]] = {
    "load-format": ("auto", "safetensors"),
    "tokenizer-mode": ("auto",),
    "distributed-executor-backend": ("mp",),
    "scheduling-policy": ("priority",),
    "response-role": ("assistant",),
    "allowed-methods": ('["*"]',),
    "allowed-headers": ('["*"]',),
    "enable-ssl-refresh": (),
    "enable-offline-docs": (),
    "exclude-tools-when-tool-choice-none": (),
    "enable-prompt-tokens-details": (),
    "enable-request-id-headers": (),
    "enable-server-load-tracking": (),
    "disable-log-requests": (),
}

# Switch -> why it changes nothing.
WITHOUT_EFFECT: dict[str, str] = {"trust-remote-code": "code that comes with a model is never run"}

NOT_IMPLEMENTED: frozenset[str] = frozenset({
    # Parallelism.
    "data-parallel-size", "dp",
    "enable-expert-parallel", "nnodes", "node-rank",
    # Weights, memory and execution.
    "tokenizer-revision", "hf-overrides", "swap-space", "cpu-offload-gb",
    "compilation-config", "attention-backend",
    "async-scheduling", "num-gpu-blocks-override", "limit-mm-per-prompt",
    "prefix-caching-hash-algo",
    # Adapters, structure.
    "enable-lora", "lora-modules", "max-loras", "max-lora-rank",
    "structured-outputs-config", "tool-parser-plugin", "watermark-config",
    # The HTTP server.
    "uds", "allow-credentials", "middleware",
    "chat-template-content-format", "uvicorn-log-level",
    # Transfer, events, tracing.
    "kv-transfer-config", "kv-events-config", "collect-detailed-traces",
})  # fmt: skip


def add_others(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """Takes the flags of SO_ANYWAY, with their values alone, and those WITHOUT_EFFECT."""
    without = argparse.BooleanOptionalAction
    return [group.add_argument(f"--{name}", action=without, default=None) for name in WITHOUT_EFFECT] + [
        group.add_argument(f"--{name}", choices=values)
        if values
        else group.add_argument(f"--{name}", action="store_true", default=None)
        for name, values in SO_ANYWAY.items()
    ]


def refuse_otherwise(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with exit code 2 where the environment or a file turns such a switch off."""
    for name in SO_ANYWAY:
        if getattr(args, name.replace("-", "_")) is False:
            parser.error(f"--{name} cannot be turned off")


def without_effect(args: argparse.Namespace) -> list[str]:
    """Sentences about the flags that were given and change nothing."""
    given = (name for name in WITHOUT_EFFECT if getattr(args, name.replace("-", "_")))
    return [f"--{name} changes nothing: {WITHOUT_EFFECT[name]}" for name in given]
