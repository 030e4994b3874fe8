"""`pagewire-launch`: what the all-in-one image runs, with what the images of vLLM, TGI and Ollama are given.

vLLM's: a model and flags; port 8000. TGI's: --model-id and its other flags, or MODEL_ID and its other variables; port
80. Ollama's: nothing, and the demo model is served. Port 11434 is open in any case.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagewire_core.errors import StartupError

from pagewire_cli import tgi_flags
from pagewire_cli.main import main as main_of_pagewire

_OLLAMA_PORT, _TGI_PORT, _VLLM_PORT = 11434, 80, 8000
# Where those images keep models, if somebody has mounted a volume there.
_CACHES = (Path("/data"), Path("/root/.cache/huggingface"))


@dataclass(frozen=True)
class Command:
    """Arguments of `pagewire`, defaults of flags of its `serve`, and TGI's flags that have no effect."""

    arguments: list[str]
    defaults: dict[str, object]
    ignored: list[str]


def command_of(given: Sequence[str], environ: Mapping[str, str]) -> Command:
    """What is meant by the arguments of an image. Raises StartupError."""
    ignored: list[str] = []
    port, given = _VLLM_PORT, list(given)
    if given[:1] == ["serve"]:
        given = given[1:]
    if tgi_flags.is_meant(given, environ):
        port = _TGI_PORT
        given, ignored = tgi_flags.translated(given, environ)
    return Command(["serve", *given], {"host": "0.0.0.0", "port": port, "ollama_port": _OLLAMA_PORT}, ignored)


def cache_of(caches: Sequence[Path]) -> Path | None:
    """The mounted volume that models are kept in. Raises StartupError if this user may not write to it."""
    for path in caches:
        if os.path.ismount(path):
            if not os.access(path, os.W_OK):
                raise StartupError(f"{path} is not writable for user {os.getuid()}: add --user $(id -u):$(id -g)")
            return path
    return None


def main() -> None:
    try:
        command = command_of(sys.argv[1:], os.environ)
        cache = cache_of(_CACHES)
    except StartupError as error:
        sys.stderr.write(f"pagewire-launch: {error}\n")
        raise SystemExit(1) from None
    if cache:
        os.environ["HF_HOME"] = str(cache)
    if command.ignored:
        print(f"without effect here: {', '.join(command.ignored)}", flush=True)
    main_of_pagewire(command.arguments, command.defaults)


if __name__ == "__main__":
    main()
