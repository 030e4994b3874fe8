"""Flags of `vllm serve`: those that pagewire does not have yet, those that may only say what is so anyway, and those
that allow what is not done: that is told.
"""

from __future__ import annotations

import argparse

# Flag -> values; none: it is a switch.
SO_ANYWAY: dict[str, tuple[str, ...]] = {
    "load-format": ("auto", "safetensors"),
    "config-format": ("hf", "auto"),
    "safetensors-load-strategy": ("lazy",),
    "model-impl": ("auto",),
    "task": ("generate", "auto"),
    "runner": ("generate", "auto"),
    "convert": ("none", "auto"),
    "tokenizer-mode": ("auto",),
    "distributed-executor-backend": ("mp",),
    "disable-custom-all-reduce": (),
    "disable-cascade-attn": (),
    "scheduling-policy": ("priority",),
    "logprobs-mode": ("raw_logprobs",),
    "stream-interval": ("1",),
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
    "disable-log-stats": (),
}

# Switch -> why it changes nothing.
WITHOUT_EFFECT: dict[str, str] = {"trust-remote-code": "code that comes with a model is never run"}

NOT_IMPLEMENTED: frozenset[str] = frozenset({
    # Parallelism.
    "data-parallel-size", "dp",
    "enable-expert-parallel", "nnodes", "node-rank", "headless",
    # Weights, memory and execution.
    "tokenizer-revision", "hf-overrides", "hf-token", "swap-space", "cpu-offload-gb", "enable-sleep-mode",
    "compilation-config", "attention-backend",
    "async-scheduling", "num-gpu-blocks-override", "limit-mm-per-prompt", "long-prefill-token-threshold",
    "optimization-level", "cudagraph-capture-sizes",
    "prefix-caching-hash-algo",
    # Adapters, structure.
    "enable-lora", "lora-modules", "max-loras", "max-lora-rank",
    "structured-outputs-config", "tool-parser-plugin", "watermark-config",
    # The HTTP server.
    "uds", "allow-credentials", "middleware",
    "chat-template-content-format", "uvicorn-log-level", "disable-uvicorn-access-log", "log-config-file",
    "enable-log-outputs", "enable-prompt-embeds", "ssl-ciphers", "shutdown-timeout",
    # Transfer, events, tracing.
    "kv-transfer-config", "kv-events-config", "collect-detailed-traces",
})  # fmt: skip


def add_others(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """Takes the flags of SO_ANYWAY, with their values alone, and those WITHOUT_EFFECT."""
    so_anyway = [
        group.add_argument(f"--{name}", choices=values)
        if values
        else group.add_argument(f"--{name}", action="store_true", default=None)
        for name, values in SO_ANYWAY.items()
    ]
    either = argparse.BooleanOptionalAction
    return so_anyway + [group.add_argument(f"--{name}", action=either, default=None) for name in WITHOUT_EFFECT]


def refuse_otherwise(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with exit code 2 where the environment or a file turns such a switch off."""
    for name in SO_ANYWAY:
        if getattr(args, name.replace("-", "_")) is False:
            parser.error(f"--{name} cannot be turned off")


def without_effect(args: argparse.Namespace) -> list[str]:
    """Sentences about the flags that were given and change nothing."""
    given = (name for name in WITHOUT_EFFECT if getattr(args, name.replace("-", "_")))
    return [f"--{name} changes nothing: {WITHOUT_EFFECT[name]}" for name in given]
