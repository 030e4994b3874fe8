"""An engine in a process of its own, asked over a pipe how long its steps take."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model

from pagewire_bench.engine_cases import Case

_BLOCK_SIZE = 16
_WIDEST = 4  # bytes of a KV element, at most


@dataclass(frozen=True)
class Method:
    """One way to run the model. runner: 'auto', the loader's choice, or 'torch', the fallback."""

    runner: str
    quantization: str | None

    @property
    def name(self) -> str:
        return f"{self.runner} {self.quantization}" if self.quantization else self.runner


@dataclass(frozen=True)
class Ready:
    """What was loaded. weights: their type, as pagewire_bench.needs names it."""

    runner: str
    weights: str
    kv_bytes_per_token: int


@dataclass(frozen=True)
class EngineSetting:
    """What all methods have in common."""

    model: Path
    dtype: str
    threads: int
    cases: tuple[Case, ...]

    @property
    def max_len(self) -> int:
        return max(case.max_len for case in self.cases)

    @property
    def pool_tokens(self) -> int:
        """The sequences of any case, and the one whose KV they copy."""
        return max((case.num_seqs + 1) * (case.max_len + _BLOCK_SIZE) for case in self.cases)


class EngineProcess:
    """Raises StartupError where the engine refuses the method."""

    def __init__(self, setting: EngineSetting, method: Method) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setting, method), daemon=True)
        with _environment(setting, method):
            self._process.start()
        theirs.close()
        self.ready: Ready = self._answer()

    def run(self, case: Case) -> list[float]:
        """See EngineProbe.run."""
        self._pipe.send(case)
        times: list[float] = self._answer()
        return times

    def close(self) -> None:
        self._pipe.close()  # the process ends when it notices
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise StartupError("the engine's process ended; its own message is above") from None
        if isinstance(answer, StartupError):
            raise answer
        return answer


@contextmanager
def _environment(setting: EngineSetting, method: Method) -> Iterator[None]:
    """What must be set before the process imports torch."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(setting.threads)
    if method.runner == "torch":
        os.environ["PAGEWIRE_KERNELS"] = "torch"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, setting: EngineSetting, method: Method) -> None:
    """The process: answers cases until the pipe is closed."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    from pagewire_bench.engine_probe import EngineProbe

    try:
        engine, ready = _load(setting, method)
    except StartupError as error:
        pipe.send(error)
        return
    probe = EngineProbe(engine, int(resolve_model(str(setting.model)).config["vocab_size"]))
    pipe.send(ready)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(probe.run(case))


def _load(setting: EngineSetting, method: Method) -> tuple[Any, Ready]:
    """Prefix caching is off: equal blocks would be shared, and every prompt is to be computed."""
    import torch
    from pagewire_engine.engine import Engine
    from pagewire_engine.loader import load
    from pagewire_engine.options import EngineOptions

    torch.set_num_threads(setting.threads)
    model = resolve_model(str(setting.model))
    options = EngineOptions(
        dtype=setting.dtype,
        device="cpu",
        quantization=method.quantization,
        threads=setting.threads,
        max_model_len=setting.max_len,
        block_size=_BLOCK_SIZE,
        kv_cache_memory_bytes=setting.pool_tokens * _kv_bytes(model.config),
        enable_prefix_caching=False,
    )
    loaded = load(model, options)
    cache = loaded.runner.cache
    weights = method.quantization or cache.layout.dtype
    return Engine(loaded.runner, loaded.config), Ready(type(loaded.runner).__name__, weights, cache.bytes_per_token)


def _kv_bytes(config: Any) -> int:
    """Of one token, at most."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(config["num_hidden_layers"] * 2 * (config.get("num_key_value_heads") or heads) * head_dim * _WIDEST)
