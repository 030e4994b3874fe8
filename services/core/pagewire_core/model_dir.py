"""Finds a model on disk or on the Hugging Face Hub and answers what its JSON files say.

Nothing here reads weights into memory or judges the architecture: the engine does. Every failure is a
StartupError of one sentence that names the remedy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pagewire_core.errors import StartupError

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")
_SAME_WEIGHTS = "consolidated*.safetensors"  # once more, as Mistral's own loader wants them
_QUANTIZED_BYTES = {"int8": 1.1, "fp8": 1.1, "int4": 0.65}  # of a weight, with its part of the scales
_WHOLE_FILE_BYTES = 256 << 20
_WINDOW_BYTES = 1 << 20
_NUM_WINDOWS = 64


@dataclass(frozen=True)
class ModelDir:
    """A model directory with safetensors weights. `name` is the model as the user gave it."""

    path: Path
    name: str
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def digest(self) -> bytes:
        """32 bytes that identify the weights: equal on every machine that has the same files.

        SHA-256 over config.json and each safetensors file's name, size and contents. Of a file above
        256 MiB only the header and 64 evenly spaced windows of 1 MiB are read, so that a start does
        not wait for a disk to deliver 100 GB.
        """
        total = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self.path.glob("*.safetensors")):
            total.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
            total.update(_file_digest(file))
        return total.digest()

    @cached_property
    def _weight_files(self) -> list[Path]:
        """The safetensors files that are loaded: a directory may hold the same weights in another form, too."""
        shards = weight_map(self.path)
        named = sorted(set(shards.values())) if shards is not None else ["model.safetensors"]
        return [self.path / name for name in named if (self.path / name).is_file()]

    @cached_property
    def weight_bytes(self) -> int:
        """Size of the weights' files."""
        return sum(file.stat().st_size for file in self._weight_files)

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in the weights' files, by their headers."""
        shapes = (entry["shape"] for file in self._weight_files for entry in _tensors(file))
        return sum(math.prod(shape) for shape in shapes)

    def loaded_bytes(self, itemsize: int, quantization: str | None) -> int:
        """Roughly what the weights take once they are loaded. itemsize: of a weight that is not quantized."""
        return int(self.num_parameters * _QUANTIZED_BYTES.get(quantization or "", itemsize))

    @cached_property
    def max_model_len(self) -> int:
        """Longest prompt plus output in tokens, from max_position_embeddings."""
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            value = self.config.get(key)
            if isinstance(value, int) and value > 0:
                return value
        raise StartupError(
            f"{self.path / 'config.json'} has no max_position_embeddings; add it or use a complete model directory"
        )

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence: of generation_config.json, else config.json, and the tokenizer's eos_token, which a
        model that was tuned for chats often has beside its base model's.

        A tokenizer may have more tokens than the model has logits, and a file may say -1: such ids never come.
        """
        end = self.config.get("vocab_size") or sys.maxsize
        return tuple(i for i in dict.fromkeys((*self._named_eos(), *self._tokenizer_eos())) if 0 <= i < end)

    def _named_eos(self) -> list[int]:
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            named = [value] if isinstance(value, int) else value if isinstance(value, list) else []
            if named:
                return [int(token_id) for token_id in named]
        return []

    def _tokenizer_eos(self) -> tuple[int, ...]:
        settings = read_json(self.path / "tokenizer_config.json", {})
        eos = special_token(settings.get("eos_token"))
        for token_id, entry in settings.get("added_tokens_decoder", {}).items():
            if entry.get("content") == eos:
                return (int(token_id),)
        for entry in read_json(self.path / "tokenizer.json", {}).get("added_tokens", []):
            if entry["content"] == eos:
                return (int(entry["id"]),)
        return ()


def resolve_model(model: str, revision: str | None = None, download_dir: str | None = None) -> ModelDir:
    """The directory of `model`: a local path, or a Hub id that is downloaded if it is not cached.

    HF_TOKEN, HF_HUB_OFFLINE and HF_HOME work as huggingface_hub documents them. Raises StartupError.
    """
    path = locate(model, revision, download_dir)
    if not (path / "config.json").is_file():
        raise StartupError(f"{path} has no config.json; give a Hugging Face model directory")
    if not any(path.glob("*.safetensors")):
        raise StartupError(f"{path} has no *.safetensors file; convert the weights to safetensors first")
    config = read_json(path / "config.json", {})
    return ModelDir(path, model, config, read_json(path / "generation_config.json", {}))


def locate(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory of a model or of a tokenizer alone, downloaded if need be. Raises StartupError."""
    local = Path(model).expanduser()
    if local.is_dir():
        return local.resolve()
    if local.is_file():
        raise StartupError(f"{model} is a file; give the directory that holds config.json and the weights")
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise StartupError(f"there is no directory {model}; give a local model directory or a Hub id like org/name")
    return _download(model, revision, download_dir)


def _download(model: str, revision: str | None, download_dir: str | None) -> Path:
    from httpx2 import TransportError  # what the Hub's library raises when a connection breaks again and again
    from huggingface_hub import errors as hub  # not at the top: importing it takes longer than all of core
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=list(_FILES),
                ignore_patterns=_SAME_WEIGHTS,
            )
        )
    except hub.HFValidationError:
        remedy = f"{model!r} is neither a local directory nor a Hub id like org/name"
    except hub.GatedRepoError:
        remedy = f"access to {model} is gated: accept its licence on the Hub and set HF_TOKEN"
    except hub.RevisionNotFoundError:
        remedy = f"{model} has no revision {revision!r}; check --revision"
    except hub.RepositoryNotFoundError:
        remedy = f"{model} was not found: check the name, give a local directory, or set HF_TOKEN if it is private"
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        remedy = f"{model} is not in the local cache and the Hub cannot be reached; give a local directory or go online"
    except hub.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        remedy = f"the Hub answered {status} for {model}; set HF_TOKEN if it needs one, or try again later"
    except TransportError as error:
        remedy = f"the connection to the Hub broke while {model} was downloaded ({error}); try again"
    except OSError as error:
        remedy = f"{model} could not be stored: {error.strerror or error}; choose another --download-dir"
    raise StartupError(remedy)


def read_json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    """The object in a JSON file; `default` if there is no such file. Raises StartupError if it is corrupt."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (ValueError, OSError) as error:
        raise StartupError(f"{path} cannot be read as JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} is not a JSON object; download the model again")
    return value


def weight_map(path: Path) -> dict[str, str] | None:
    """File of each tensor by the index of a model's shards; None if there is no index. Raises StartupError."""
    index = path / "model.safetensors.index.json"
    shards = read_json(index, {"weight_map": None}).get("weight_map", ())
    if shards is None:
        return None
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise StartupError(f"{index} is no index of shards; download the model again")
    return shards


def special_token(value: object) -> str | None:
    """The text of a special token, which JSON files give as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _tensors(path: Path) -> list[dict[str, Any]]:
    """What the header of a safetensors file says of each tensor; nothing if it has no header."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > path.stat().st_size:
            return []
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            return []
    return [entry for name, entry in header.items() if name != "__metadata__"]


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            while chunk := file.read(_WINDOW_BYTES):
                digest.update(chunk)
            return digest.digest()
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, _WHOLE_FILE_BYTES)))
        for index in range(_NUM_WINDOWS):
            file.seek(index * (size - _WINDOW_BYTES) // (_NUM_WINDOWS - 1), os.SEEK_SET)
            digest.update(file.read(_WINDOW_BYTES))
    return digest.digest()
