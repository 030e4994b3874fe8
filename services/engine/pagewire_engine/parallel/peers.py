"""What the ranks of a worker tell each other within a step, through torch.distributed: Gloo on a CPU, NCCL on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pagewire_transfer.relay_store import RelayStore
from torch import Tensor

from pagewire_engine.models.part import WHOLE, Part

# A stage waits for all that the stages before it compute in a step. A rank that dies ends the worker at once.
_TIMEOUT = timedelta(minutes=5)
_HIDDEN_TAG = 0
_KEYS_PER_RANK = 16  # far more than its two groups set
START_S = 120.0  # that ranks may take to join


def key_store(put: Callable[[str, bytes], None], num_ranks: int) -> RelayStore:
    """Of the groups of a worker's ranks; `put` delivers what one rank sets to all others."""
    return RelayStore(put, START_S, _KEYS_PER_RANK * num_ranks)


class Peers(Protocol):
    """The other ranks, as a model's forward pass sees them. Every rank of a stage makes the same calls."""

    @property
    def part(self) -> Part: ...

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """x [T, widths[rank]] of every rank of the stage -> [T, sum of widths], side by side."""
        ...

    def gather_bytes(self, mine: Tensor, everyones: Tensor) -> None:
        """mine uint8 [N] of every rank of the stage -> everyones uint8 [ranks * N]."""
        ...

    def receive(self, hidden: Tensor) -> None:
        """Fills `hidden` with what the stage before sends."""
        ...

    def send(self, hidden: Tensor) -> None:
        """To the stage that follows."""
        ...


class Alone:
    """A worker of one rank."""

    part = WHOLE

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return x

    def gather_bytes(self, mine: Tensor, everyones: Tensor) -> None:
        raise AssertionError("one rank has nobody to tell")

    def receive(self, hidden: Tensor) -> None:
        raise AssertionError("one stage has none before it")

    def send(self, hidden: Tensor) -> None:
        raise AssertionError("one stage has none after it")


ALONE = Alone()


class GroupPeers:
    """The groups of one rank. store: only the ranks of this worker can reach it. Blocks until all ranks are there."""

    def __init__(self, part: Part, store: dist.Store, device: torch.device) -> None:
        self.part = part
        make = _nccl if device.type == "cuda" else _gloo
        stage = dist.PrefixStore(f"stage-{part.stage}", store)
        self._stage: Any = make(stage, part.rank, part.ranks) if part.ranks > 1 else None
        row = dist.PrefixStore(f"row-{part.rank}", store)
        self._row: Any = make(row, part.stage, part.stages) if part.stages > 1 else None

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        if self.part.ranks == 1:
            return x
        widest = max(widths)
        if x.shape[1] < widest:
            x = torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        everyones = x.new_empty(len(widths), len(x), widest)
        self.gather_bytes(_bytes(x.contiguous()), _bytes(everyones))
        return torch.cat([part[:, :width] for part, width in zip(everyones, widths, strict=True)], -1)

    def gather_bytes(self, mine: Tensor, everyones: Tensor) -> None:
        self._stage._allgather_base(everyones, mine).wait()

    def receive(self, hidden: Tensor) -> None:
        self._row.recv([_bytes(hidden)], self.part.stage - 1, _HIDDEN_TAG).wait()

    def send(self, hidden: Tensor) -> None:
        self._row.send([_bytes(hidden)], self.part.stage + 1, _HIDDEN_TAG).wait()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _gloo(store: dist.Store, rank: int, size: int) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = _TIMEOUT
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, size, options)
