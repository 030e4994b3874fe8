"""Safetensors -> tensors, in the compute dtype on the compute device. Pickles are never opened."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import structlog
import torch
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import weight_map
from safetensors import SafetensorError, safe_open

log = structlog.get_logger(__name__)

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


class Checkpoint:
    """The safetensors files of a model directory, one or sharded with an index.

    A context manager: files are mapped while it is open. Every failure is a StartupError.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._path, self._dtype, self._device = path, dtype, device
        self._file_of = _locate(path)
        self._open: dict[str, safe_open] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._open.clear()

    def take(self, name: str, shape: tuple[int, ...], rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The tensor called `name`, checked against the shape that config.json implies; or only some of its rows."""
        name = self._stored_name(name)
        file = self._file_of.get(name)
        if file is None:
            raise StartupError(f"the checkpoint in {self._path} has no tensor {name}; download the model again")
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._path / file, "pt")  # type: ignore[no-untyped-call]
            stored = self._open[file].get_slice(name)
            found = tuple(stored.get_shape())
            if found != shape:
                raise StartupError(
                    f"tensor {name} in {self._path} has shape {found}, config.json implies {shape}; "
                    "the checkpoint and its config do not belong together"
                )
            tensor = stored[rows[0] : rows[1]] if rows else self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(self._path / file, error) from None
        return tensor.to(device=self._device, dtype=self._dtype)

    def _stored_name(self, name: str) -> str:
        """Models that were saved without a head, as those for embeddings are, lack the "model." of the whole one."""
        if name in self._file_of or _EMBEDDING not in self._file_of:
            return name
        if name == _HEAD:
            log.warning("the checkpoint has no head: embeddings are right, generated text means nothing")
            return _EMBEDDING
        return name.removeprefix("model.")


def _corrupt(file: Path, error: Exception) -> StartupError:
    return StartupError(f"cannot read {file}: {error}; the file is missing or corrupt, download the model again")


def _locate(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    if (shards := weight_map(path)) is not None:
        return shards
    file = path / "model.safetensors"
    if not file.exists():
        raise StartupError(f"{path} has no model.safetensors and no index of shards; only safetensors are loaded")
    try:
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            return dict.fromkeys(opened.keys(), file.name)
    except (SafetensorError, OSError) as error:
        raise _corrupt(file, error) from None
