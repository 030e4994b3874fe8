"""The runner of a worker of several ranks, on rank 0: every step goes to all of them."""

from __future__ import annotations

import os
import socket

import structlog
import torch

from pagewire_engine.batch import Batch
from pagewire_engine.kv_cache import KVCache
from pagewire_engine.model_runner import Done, Launched, RankRunner, Tensors
from pagewire_engine.models.part import Part
from pagewire_engine.parallel import messages
from pagewire_engine.parallel.pools import JoinedKVCache
from pagewire_engine.parallel.team import EXIT_CODE, Team

log = structlog.get_logger(__name__)


class ParallelRunner:
    """A Runner, with one step under way. own: this rank's part of it."""

    overlaps = False

    def __init__(self, own: RankRunner, cache: JoinedKVCache, part: Part, team: Team) -> None:
        self.config = own.config
        self.cache: KVCache = cache
        # A layer's attention is whole here when every rank of this stage has written its KV; and these layers are the
        # model's first ones. Those of other stages are told of when the step is over.
        self.progress = own.progress
        self._own, self._part, self._team = own, part, team

    def launch(self, batch: Batch) -> Launched:
        sampling = self._own.sampling(batch)
        try:
            result = self._compute(batch, sampling)
        except Exception:  # the ranks no longer agree on what the next message is
            log.critical("a step was lost between the ranks of this worker", exc_info=True)
            os._exit(EXIT_CODE)
        return Done.with_scores(batch, self._own.choose(batch, sampling, result), result)

    def _compute(self, batch: Batch, sampling: messages.Arrays) -> Tensors:
        self._team.send(messages.batch_arrays(batch, self.cache.block_size) | sampling)
        result = self._own.compute(batch, sampling)
        if result is None:  # what tells that the step is done, too
            arrays = self._team.receive((self._part.stages - 1) * self._part.ranks)
            result = {name: torch.from_numpy(array).to(self.config.device) for name, array in arrays.items()}
        return result

    def rest(self) -> None:
        """Ranks lend no cores."""

    def close(self) -> None:
        """Ends the other ranks."""
        self._team.close()


def work(runner: RankRunner, part: Part, link: socket.socket) -> None:
    """On the other ranks: this rank's part of every step that rank 0 sends. Raises ConnectionError when it is gone."""
    answers = part.is_last and part.rank == 0 and part.stages > 1
    while True:
        arrays = messages.receive(link)
        result = runner.compute(messages.to_batch(arrays), arrays)
        if answers:
            assert result is not None
            messages.send(link, {name: _float32(tensor).cpu().numpy() for name, tensor in result.items()})


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    """numpy has no bfloat16."""
    return tensor.float() if tensor.is_floating_point() else tensor
