"""Every command-line flag, once: name, type, default and help. Spelled as vLLM spells them.

`command_line.py` makes parsers of them; `settings.py` reads them from the environment and from files.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from pagewire_core.telemetry import LOG_FORMATS, LOG_LEVELS

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Flag:
    default: Any
    help: str
    type: Callable[[str], Any] | None = str  # None: a switch with a --no- form
    choices: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()  # as they are typed
    several: bool = False  # takes all words up to the next flag, as one with commas


def size(text: str) -> int:
    """'1024', '512M', '4G', '4GiB', '1.5k' -> bytes (powers of 1024 for K, M, G, T)."""
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(number[-1:], 1)
    try:
        value = int(float(number.rstrip("KMGT")) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512M or 4G") from None
    if value <= 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def number(name: str, kind: Callable[[str], N], accepts: Callable[[N], bool], refusal: str) -> Callable[[str], N]:
    """The type of a flag that is a number within bounds; `name` is what an error calls text that is no number."""

    def read(text: str) -> N:
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(refusal)
        return value

    read.__name__ = name
    return read


def _short(text: str) -> int:
    """As vLLM reads numbers of tokens: '8192', '8K' (powers of 1024), '8k' and '1.5k' (powers of 1000)."""
    written = re.fullmatch(r"(\d+)(\.\d+)?([kmgtKMGT])", text)
    if written is None:
        return int(text)
    whole, decimals, unit = written.groups()
    if decimals and unit.isupper():
        raise argparse.ArgumentTypeError(f"{text!r} has decimals of a power of 1024; write {text.lower()}")
    power = "kmgt".index(unit.lower()) + 1
    return int(Decimal(whole + (decimals or "")) * (1000 if unit.islower() else 1024) ** power)


positive = number("whole number", int, lambda n: n > 0, "must be positive")
several = number("whole number", _short, lambda n: n > 1, "must be 2 or more")
tokens = number("whole number", _short, lambda n: n > 0, "must be positive")
count = number("count", int, lambda n: 0 <= n < 2**32, "must be 0 or more, and below 4294967296")
not_negative = number("number", float, lambda x: 0 <= x < math.inf, "must be finite and not negative")
port = number("port", int, lambda n: 0 <= n <= 65535, "must be between 0 and 65535")
fraction = number("fraction", float, lambda x: 0 < x <= 1, "must be in (0, 1]")
seconds = number("seconds", float, lambda x: 0 < x < math.inf, "must be positive and finite")


def model(text: str) -> str:
    """What names one: an empty variable in a script is a mistake, and no wish for the demo model."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def host(text: str) -> str:
    """A name or an address, an IPv6 one with or without brackets."""
    return text.strip("[]")


def cpus(text: str) -> tuple[int, ...]:
    """'0,2-3' -> (0, 2, 3); each once, ranges upwards."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of cores; write 0,2-3")
        numbers += range(int(first), int(last or first) + 1) or [-1]
    if -1 in numbers or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a core twice or counts down; write 0,2-3")
    return tuple(numbers)


def origins(text: str) -> tuple[str, ...]:
    """'["https://example.org"]' -> that origin."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(origin, str) for origin in found):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON list of origins; write ["https://example.org"]')
    return tuple(found)


def root_path(text: str) -> str:
    """'/llm/' -> '/llm'; '/' -> ''."""
    path = text.rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)*", path):
        raise argparse.ArgumentTypeError(f"{text!r} is no path; write /llm")
    return path


def collector(text: str) -> str:
    """'http://host:4317', with https for TLS; also grpc://host:4317 and host:4317, as vLLM's documentation has it."""
    scheme, separated, rest = text.rpartition("://")
    host, colon, number = rest.rstrip("/").rpartition(":")
    if (separated and scheme not in ("http", "https", "grpc")) or not host or not colon or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no gRPC port of an OTLP collector; write http://host:4317")
    return text


FLAGS: dict[str, Flag] = {
    # The model.
    "model": Flag(None, "a local directory or a Hugging Face Hub id", model),
    "tokenizer": Flag(None, "a directory or Hub id with tokenizer.json; default: the model's"),
    "revision": Flag(None, "branch, tag or commit of a Hub model"),
    "download-dir": Flag(None, "where Hub models are kept; default: the Hub's own cache"),
    "dtype": Flag("auto", "compute and KV dtype; auto: the checkpoint's, float32 for float16 on a CPU",
                  choices=("auto", "float32", "bfloat16", "float16", "half", "float")),
    "device": Flag("auto", "auto: cuda if there is one", choices=("auto", "cpu", "cuda")),
    "tensor-parallel-size": Flag(1, "processes that share every layer of the model; on CUDA, a GPU each", positive,
                                 aliases=("-tp", "--num-shard")),
    "pipeline-parallel-size": Flag(1, "stages of layers, each of --tensor-parallel-size processes", positive,
                                   aliases=("-pp",)),
    "quantization": Flag(None, "store the weights in fewer bits, made at load from an unquantized checkpoint",
                         choices=("int8", "int4", "fp8"), aliases=("-q",)),
    "served-model-name": Flag(None, "names clients may ask for, with spaces or commas between them; default: the model "
                                    "as given", several=True),
    "chat-template": Flag(None, "a Jinja file or template; default: the model's"),
    "default-chat-template-kwargs": Flag(None, "variables of the chat template where a request does not say, as JSON: "
                                               '{"enable_thinking": false}'),
    "trust-request-chat-template": Flag(False, "requests may bring a chat template of their own; it is rendered in a "
                                               "process with bounds", None),
    "max-model-len": Flag(None, "longest prompt + output in tokens; default: the model's", tokens),
    "max-input-tokens": Flag(None, "longest prompt in tokens; default: what the context allows", tokens,
                             aliases=("--max-input-length",)),
    "generation-config": Flag("auto", "sampling defaults of OpenAI's and Anthropic's routes: auto, the model's "
                                      "generation_config.json; vllm, OpenAI's; or a folder with such a file"),
    "override-generation-config": Flag(None, "sampling defaults over those, as JSON: temperature, top_p, top_k, min_p, "
                                             "repetition_penalty, max_new_tokens"),
    "max-logprobs": Flag(20, "tokens whose log probabilities may be asked for in the place of one", count),
    "seed": Flag(None, "of the seeds that requests without one get, each the next: the same requests in the same order "
                       "have the same answers again", int),
    # The engine.
    "block-size": Flag(16, "tokens in a KV block; divides 64", int, choices=("8", "16", "32", "64")),
    "gpu-memory-utilization": Flag(0.9, "share of the device's memory for weights and KV (of free RAM on a CPU, "
                                        "bounded to 4 GiB of KV unless --kv-cache-memory-bytes says more)", fraction),
    "kv-cache-memory-bytes": Flag(None, "size of the KV pool; overrides --gpu-memory-utilization", size),
    "kv-cache-dtype": Flag("auto", "dtype of the KV pool; auto: the compute dtype; fp8 (e4m3) halves it, on CUDA only",
                           choices=("auto", "fp8", "fp8_e4m3")),
    "enforce-eager": Flag(False, "no CUDA graphs: faster start, slower decoding; without effect on a CPU", None),
    "max-num-seqs": Flag(128, "sequences that a worker runs at a time", positive),
    "max-num-batched-tokens": Flag(2048, "tokens in one step: of prompts and of answers, so 2 or more", several),
    "max-prefill-delay-ms": Flag(50.0, "milliseconds that chunks of prompts may add to a step in which others decode; "
                                       "0: no limit", not_negative),
    "speculative-config": Flag(None, "draft tokens, as JSON: method (ngram, draft_model), num_speculative_tokens, "
                                     "prompt_lookup_max, prompt_lookup_min, model, disable_by_batch_size"),
    "speculate": Flag(None, "as many draft tokens by prompt lookup; short for --speculative-config", positive),
    "enable-prefix-caching": Flag(True, "reuse KV of equal prefixes", None),
    "enable-chunked-prefill": Flag(True, "compute prompts in chunks beside decoding; cannot be turned off", None),
    "lanes": Flag("auto", "how KV travels, best first, of nccl (between two GPUs), shm (on one host), gloo, tcp (with "
                           "TLS), grpc; auto: all that work, with TLS those that strangers can neither read nor write"),
    "threads": Flag(None, "CPU threads of the engine, of all its processes; default: the cores, or what a "
                          "container may use of them, divided by the workers",
                    positive),
    "cpus": Flag((), "cores that the engine's threads divide among them (0,2-3); default: all", cpus),
    "cpu-lending": Flag(None, "a file in memory (/dev/shm/x) through which the workers of a host, each with --cpus of "
                              "its own, lend each other idle cores"),
    # How its answers are read.
    "tool-call-parser": Flag(None, "how the model writes calls of tools", choices=(
        "hermes", "qwen", "qwen25", "qwen3", "qwen3_coder", "qwen3_xml", "llama3_json", "llama4_json", "json",
        "mistral", "deepseek_v3", "deepseek_v31")),
    "enable-auto-tool-choice": Flag(False, "the model may decide whether to call a tool (tool_choice auto)", None),
    "reasoning-parser": Flag(None, "how the model marks its thoughts", choices=(
        "deepseek_r1", "deepseek_v3", "glm45", "mistral", "qwen3", "seed_oss")),
    # The services.
    "role": Flag("both", "what this worker does", choices=("prefill", "decode", "both")),
    "worker-id": Flag(None, "a stable name; default: role, host and port"),
    "host": Flag("127.0.0.1", "address to listen on; a worker tells it to others, or with 0.0.0.0 the one that it has "
                              "on the way to Redis", host),
    "port": Flag(0, "port to listen on; 0: any free one", port),
    "redis-url": Flag(None, "redis://host:port/db of the index and registry"),
    "router": Flag(None, "host:port of the router"),
    "api-key": Flag("", "keys that clients must show, with spaces or commas between them; PAGEWIRE_API_KEY keeps them "
                        "from `ps`", several=True),
    "api-keys-file": Flag(None, "a YAML list of named keys with tenants and limits (`pagewire key` makes entries)"),
    "response-store-ttl": Flag(86400.0, "seconds that stored responses (/v1/responses) are kept after their last use",
                               seconds),
    "allowed-origins": Flag((), "web pages of these origins may call the APIs, as a JSON list; [\"*\"]: any", origins),
    "ollama-port": Flag(None, "a second port with the same APIs, for Ollama's clients, which expect 11434", port),
    "enable-force-include-usage": Flag(False, "streams of chats and completions end with their usage, asked for or not",
                                       None),
    "enable-tokenizer-info-endpoint": Flag(False, "GET /tokenizer_info tells clients the tokenizer's settings, its "
                                                  "chat template among them", None),
    "disable-fastapi-docs": Flag(False, "no /openapi.json and no /docs", None),
    "root-path": Flag("", "the path under which a proxy serves the APIs, which it may take away or leave", root_path),
    "own-port": Flag(None, "a port on loopback that is this bridge's alone; several bridges then share --port and "
                           "--ollama-port, and the kernel spreads connections over them (Linux)", port),
    "api-server-rank": Flag(None, "which of several routers or bridges of a host this is: its metrics say so", count),
    "ssl-keyfile": Flag(None, "PEM private key of the HTTPS server; without it, it speaks plain HTTP"),
    "ssl-certfile": Flag(None, "PEM certificate of the HTTPS server; replaced files are taken up by themselves"),
    "ssl-ca-certs": Flag(None, "PEM certificates of the authorities of HTTPS clients"),
    "ssl-cert-reqs": Flag(0, "certificates of HTTPS clients: 0 not asked for, 1 checked if shown, 2 required",
                          int, choices=("0", "1", "2")),
    "tls-cert": Flag(None, "PEM certificate of this service, for mutual TLS with the others (`pagewire certs`)"),
    "tls-key": Flag(None, "PEM private key of --tls-cert"),
    "tls-ca": Flag(None, "PEM certificate of the authority that has signed every service's certificate"),
    "workers": Flag("", "host:port of workers to know besides the registered ones, comma-separated"),
    "routing-policy": Flag("pagewire", "how workers are chosen: by predicted time, or as others do",
                           choices=("pagewire", "round_robin", "least_loaded", "prefix", "dynamo", "llm_d")),
    "max-queued-requests": Flag(1024, "requests that may wait; more are answered 429", positive),
    "max-queued-tokens": Flag(1 << 20, "prompt tokens that may wait for each worker that computes prompts; more are "
                                       "answered 429", tokens),
    "request-timeout": Flag(600.0, "seconds a request may take in all", seconds),
    "send-timeout": Flag(30.0, "seconds in which a client may take nothing of its answer; then it is cancelled",
                         seconds),
    "transfer-timeout": Flag(30.0, "seconds a KV transfer may stand still", seconds),
    "graceful-termination-timeout": Flag(10.0, "seconds that running requests may go on after SIGTERM; what a decode "
                                               "worker has left then goes on elsewhere", not_negative),
    "log-format": Flag("auto", "auto: console on a terminal, JSON elsewhere", choices=LOG_FORMATS),
    "otlp-traces-endpoint": Flag(None, "where traces of requests go: the gRPC port of an OTLP collector, as "
                                       "http://host:4317", collector),
    "otlp-service-name": Flag(None, "service.name of the spans; default: OTEL_SERVICE_NAME, or pagewire-router etc."),
    "enable-log-requests": Flag(False, "the router logs every request with its parameters and its PROMPT, which is "
                                       "private and is in no log otherwise", None),
    "max-log-len": Flag(None, "characters and token ids of a prompt that --enable-log-requests shows at most; default: "
                              "all", count),
    "log-level": Flag("info", "least severe line that is logged", choices=LOG_LEVELS),
}  # fmt: skip

SSL_FLAGS = ("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs")
TLS_FLAGS = ("tls-cert", "tls-key", "tls-ca")
TRACE_FLAGS = ("otlp-traces-endpoint", "otlp-service-name")
ROUTER_FLAGS = (
    "model", "tokenizer", "revision", "download-dir", "served-model-name", "chat-template",
    "default-chat-template-kwargs", "trust-request-chat-template", "max-input-tokens", "generation-config",
    "override-generation-config",
    "max-logprobs", "seed", "host", "port", "redis-url", "workers", "routing-policy", "max-queued-requests",
    "max-queued-tokens", "request-timeout", "send-timeout", "transfer-timeout", "graceful-termination-timeout",
    "api-server-rank", *TLS_FLAGS, *TRACE_FLAGS, "enable-log-requests", "max-log-len", "log-format", "log-level",
)  # fmt: skip
WORKER_FLAGS = (
    "role", "model", "tokenizer", "revision", "download-dir", "dtype", "device", "tensor-parallel-size",
    "pipeline-parallel-size", "quantization", "max-model-len", "block-size", "gpu-memory-utilization",
    "kv-cache-memory-bytes", "kv-cache-dtype", "enforce-eager", "max-num-seqs",
    "max-num-batched-tokens", "max-prefill-delay-ms", "enable-prefix-caching", "enable-chunked-prefill",
    "speculative-config", "speculate", "lanes", "threads", "cpus", "cpu-lending", "worker-id", "host", "port",
    "redis-url", "transfer-timeout", "graceful-termination-timeout", *TLS_FLAGS, *TRACE_FLAGS,
    "log-format", "log-level",
)  # fmt: skip
BRIDGE_FLAGS = (
    "router", "tool-call-parser", "enable-auto-tool-choice", "reasoning-parser",
    "host", "port", "redis-url", "api-key", "api-keys-file", "response-store-ttl", "allowed-origins", "ollama-port",
    "enable-force-include-usage", "enable-tokenizer-info-endpoint", "disable-fastapi-docs", "root-path", "own-port",
    "api-server-rank",
    "request-timeout", "send-timeout", "graceful-termination-timeout",
    *SSL_FLAGS, *TLS_FLAGS, *TRACE_FLAGS, "log-format", "log-level",
)  # fmt: skip

# As --help shows them.
FLAG_GROUPS: dict[str, tuple[str, ...]] = {
    "the model": (
        "model", "tokenizer", "revision", "download-dir", "served-model-name", "chat-template",
        "default-chat-template-kwargs", "trust-request-chat-template", "max-model-len",
        "max-input-tokens", "generation-config", "override-generation-config", "max-logprobs", "seed", "dtype",
        "quantization",
    ),
    "memory and steps": (
        "device", "gpu-memory-utilization", "kv-cache-memory-bytes", "kv-cache-dtype", "block-size",
        "enable-prefix-caching", "max-num-seqs", "max-num-batched-tokens", "max-prefill-delay-ms",
        "enable-chunked-prefill", "enforce-eager",
    ),
    "processes and cores": (
        "tensor-parallel-size", "pipeline-parallel-size", "threads", "cpus", "cpu-lending",
    ),
    "speculation": ("speculative-config", "speculate"),
    "tools and thoughts": ("tool-call-parser", "enable-auto-tool-choice", "reasoning-parser"),
    "HTTP": (
        "root-path", "ollama-port", "own-port", "api-key", "api-keys-file", "allowed-origins", "response-store-ttl",
        "enable-force-include-usage", "enable-tokenizer-info-endpoint", "disable-fastapi-docs",
        "ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs",
    ),
    "routing and queue": ("routing-policy", "max-queued-requests", "max-queued-tokens", "workers"),
    "the service": ("role", "worker-id", "api-server-rank", "host", "port", "router", "redis-url", "lanes"),
    "TLS between services": TLS_FLAGS,
    "time": ("request-timeout", "send-timeout", "transfer-timeout", "graceful-termination-timeout"),
    "logs and traces": ("log-format", "log-level", "enable-log-requests", "max-log-len", *TRACE_FLAGS),
}  # fmt: skip
