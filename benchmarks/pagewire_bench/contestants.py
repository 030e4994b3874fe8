"""How each server is started for a comparison: same model, precision, threads and room for sequences.

None stands for a server that does not have the model in that precision.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pagewire_core.machine import available_cpus

from pagewire_bench import compressed

PRECISIONS = ("bf16", "int8", "int4")
OURS = ("pagewire both", "pagewire 1P1D")
_GGUF = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
_KV_GIB = 1  # more than any load has in flight; whoever starts anew takes new memory for every page, which is slow


@dataclass(frozen=True)
class Setting:
    """What all servers of a comparison have in common. `max_len` tokens of prompt and answer, `slots` sequences."""

    model: Path
    precision: str
    threads: int
    slots: int
    max_len: int
    total_tokens: int  # most that are in flight in any load


@dataclass(frozen=True)
class Contestant:
    """One server. Slow starters are stopped with SIGSTOP between their turns, the others are started anew."""

    name: str
    command: tuple[str, ...]  # the port follows
    environment: Mapping[str, str] = field(default_factory=dict)
    starts_slowly: bool = False
    model: str = "model"  # the name that requests ask for

    @property
    def shown(self) -> str:
        """The command without the folders of this machine."""
        return " ".join(Path(part).name if part.startswith("/") else part for part in self.command[:-1])


def pagewire(setting: Setting, arrangement: str) -> Contestant:
    """`arrangement` is one of OURS; two workers divide the cores, and lend each other those that they do not use."""
    both = arrangement == "pagewire both"
    workers = ("--both=1",) if both else ("--prefill=1", "--decode=1")
    cpus = ",".join(map(str, available_cpus()[: setting.threads]))
    command = [
        str(Path(sys.executable).with_name("pagewire")), "serve", str(setting.model), *workers, f"--cpus={cpus}",
        "--dtype=bfloat16", "--served-model-name=model", f"--max-model-len={setting.max_len}", "--log-level=warning",
        f"--max-num-seqs={setting.slots}", f"--kv-cache-memory-bytes={_KV_GIB * 1024 // (1 if both else 2)}M",
    ]  # fmt: skip
    if setting.precision != "bf16":
        command.append(f"--quantization={setting.precision}")
    return Contestant(arrangement, (*command, "--port"))


def llama_cpp(setting: Setting, binary: str) -> Contestant | None:
    """llama.cpp's own server, continuous batching over as many slots as sequences; each slot has its share of -c."""
    weights = setting.model / f"model-{_GGUF[setting.precision]}.gguf"
    if not weights.exists():
        return None
    command = (
        binary, "--model", str(weights), "--alias", "model",
        "--parallel", str(setting.slots), "--ctx-size", str(setting.slots * setting.max_len),
        "--threads", str(setting.threads), "--threads-batch", str(setting.threads), "--no-kv-unified",
        "--cache-ram", "0", "--no-ui", "--log-verbosity", "1", "--host", "127.0.0.1", "--port",
    )  # fmt: skip
    return Contestant("llama.cpp", command)


def vllm(setting: Setting, python: str) -> Contestant | None:
    """vLLM's CPU backend, torch.compile on."""
    model = setting.model if setting.precision == "bf16" else compressed.directory_of(setting.model, setting.precision)
    if not model.exists():
        return None
    command = (
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", str(setting.max_len),
        "--max-num-seqs", str(setting.slots), "--generation-config", "vllm", "--host", "127.0.0.1", "--port",
    )  # fmt: skip
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(map(str, preloads(Path(python)))),
    }
    return Contestant("vLLM", command, environment, starts_slowly=True)


def transformers(setting: Setting, python: str) -> Contestant | None:
    """transformers' continuous batching behind a server of ours."""
    if setting.precision != "bf16":
        return None
    script = str(Path(__file__).with_name("transformers_server.py"))
    command = (python, script, str(setting.model), str(setting.total_tokens), "--port")
    return Contestant("transformers", command, {"OMP_NUM_THREADS": str(setting.threads)}, starts_slowly=True)


def preloads(python: Path) -> list[Path]:
    """The allocator and the OpenMP runtime that vLLM's documentation wants preloaded, where they are installed."""
    prefix = python.absolute().parents[1]
    found = (
        sorted([*prefix.glob("lib/libtcmalloc_minimal.so.4"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]),
        sorted(prefix.glob("lib/libiomp5.so")),
    )
    return [libraries[0] for libraries in found if libraries]
