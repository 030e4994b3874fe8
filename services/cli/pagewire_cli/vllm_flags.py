"""Flags of `vllm serve` that pagewire does not have yet: known, so that the refusal can say so."""

from __future__ import annotations

NOT_IMPLEMENTED: frozenset[str] = frozenset({
    # Parallelism.
    "data-parallel-size", "dp",
    "enable-expert-parallel", "distributed-executor-backend", "nnodes", "node-rank",
    # Weights, memory and execution.
    "q", "load-format", "tokenizer-mode", "tokenizer-revision", "hf-overrides",
    "trust-remote-code", "swap-space", "cpu-offload-gb",
    "compilation-config", "attention-backend", "seed",
    "scheduling-policy", "async-scheduling", "num-gpu-blocks-override", "max-logprobs", "limit-mm-per-prompt",
    "prefix-caching-hash-algo",
    # Adapters, structure.
    "enable-lora", "lora-modules", "max-loras", "max-lora-rank",
    "structured-outputs-config", "tool-parser-plugin", "watermark-config",
    # The HTTP server.
    "uds", "enable-ssl-refresh",
    "allowed-methods", "allowed-headers", "allow-credentials", "root-path", "middleware",
    "api-server-count", "response-role", "chat-template-content-format", "enable-prompt-tokens-details",
    "enable-request-id-headers", "enable-server-load-tracking", "enable-log-requests", "max-log-len",
    "uvicorn-log-level", "disable-fastapi-docs",
    # Transfer, events, tracing.
    "kv-transfer-config", "kv-events-config", "collect-detailed-traces",
})  # fmt: skip
