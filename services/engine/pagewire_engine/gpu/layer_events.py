"""How far a step on a GPU is: events behind its layers, and a thread that waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from pagewire_engine.layer_progress import LayerProgress


class LayerEvents:
    """Tells `progress` of layers when the device has done them; on a CPU (tests) they are done at once."""

    def __init__(self, progress: LayerProgress, device: torch.device) -> None:
        self._progress, self._is_gpu = progress, device.type == "cuda"
        self._events: queue.SimpleQueue[tuple[torch.cuda.Event, Callable[[int], None], int]] = queue.SimpleQueue()
        if self._is_gpu:
            threading.Thread(target=self._wait, name="layers", daemon=True).start()

    def of(self, step: int, group: int) -> Callable[[int], None]:
        """To be called when the kernels of so many layers have been launched."""
        tell = self._progress.of(step, group)
        if not group or not self._is_gpu:
            return tell

        def launched(layers: int) -> None:
            if layers % group == 0:
                event = torch.cuda.Event()
                event.record()
                self._events.put((event, tell, layers))

        return launched

    def _wait(self) -> None:
        while True:
            event, tell, layers = self._events.get()
            event.synchronize()
            tell(layers)
