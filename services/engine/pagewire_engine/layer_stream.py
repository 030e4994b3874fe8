"""Prompts whose KV is sent while the step that computes it still runs, layers first."""

from __future__ import annotations

from dataclasses import replace

from pagewire_engine.batch import Batch
from pagewire_engine.events import Progress
from pagewire_engine.model_runner import Runner
from pagewire_engine.outbox import Outbox
from pagewire_engine.sequence import Request

# KV of one prompt that is worth telling of: less makes small chunks, and each wakes three threads.
GROUP_BYTES = 2 << 20


class LayerStream:
    """Of the steps in flight: which prompts of others they compute, and how far they are.

    `watched` is the engine's thread's; all else is under the engine's lock.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._prompts: dict[int, list[tuple[Request, int, int]]] = {}  # step -> request, first token, end
        self.enabled = False

    def watched(self, batch: Batch, step: int) -> Batch:
        """The batch that tells how far it is, if it computes enough of a prompt that is to be sent."""
        if not self.enabled or self._runner.progress is None:
            return batch
        chunks = [(seq, count) for seq, count in batch.scheduled if seq.request.prefill_only]
        group = self._layer_group(max((count for _, count in chunks), default=0))
        if not group:
            return batch
        # Earlier tokens are of earlier steps, which are over when this one begins.
        self._prompts[step] = [(seq.request, seq.num_scheduled - count, seq.num_scheduled) for seq, count in chunks]
        return replace(batch, number=step, layer_group=group)

    def _layer_group(self, num_tokens: int) -> int:
        """As few layers of so many tokens as make GROUP_BYTES; 0: no group but all of them does."""
        num_layers = self._runner.config.num_layers
        layer_bytes = num_tokens * self._runner.cache.bytes_per_token // num_layers
        group = -(-GROUP_BYTES // layer_bytes) if layer_bytes else num_layers
        return group if group < num_layers else 0

    def news(self) -> Outbox:
        """How far the latest step is, for each of its prompts; nothing once it has landed."""
        assert self._runner.progress is not None
        step, layers = self._runner.progress.read()
        prompts = self._prompts.get(step, []) if layers else []
        return [(request, Progress(begin, (end, layers))) for request, begin, end in prompts]

    def landed(self, step: int) -> None:
        self._prompts.pop(step, None)
