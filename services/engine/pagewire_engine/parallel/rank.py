"""A rank of a worker other than the first: `python -m pagewire_engine.parallel.rank RANK STEPS_FD KEYS_FD`.

It has no port, takes no requests and no signals but SIGKILL, and ends with its worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model
from pagewire_core.telemetry import configure_logging
from pagewire_transfer.relay_store import RelayStore

from pagewire_engine.models.part import Part
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel import messages
from pagewire_engine.parallel.loading import load_rank
from pagewire_engine.parallel.pools import SharedMemory
from pagewire_engine.parallel.runner import work
from pagewire_engine.parallel.team import START_S


def main() -> None:
    rank, steps, keys = int(sys.argv[1]), *(socket.socket(fileno=int(file)) for file in sys.argv[2:4])
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the worker decides when this rank ends
    configure_logging(f"rank-{rank}", "auto", "warning")
    try:
        _run(rank, steps, keys)
    except ConnectionError:
        os._exit(0)  # the worker has ended
    except StartupError as error:
        sys.stderr.write(f"pagewire-worker: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def _run(rank: int, steps: socket.socket, keys: socket.socket) -> None:
    hello = json.loads(messages.receive(steps)["hello"].tobytes())
    options = EngineOptions(**hello["options"] | {"cpus": tuple(hello["options"]["cpus"])})
    part = Part.of(rank, options.tensor_parallel_size, options.pipeline_parallel_size)
    store = RelayStore(lambda key, value: messages.send(keys, {key: np.frombuffer(value, np.uint8)}), START_S)
    threading.Thread(target=_listen, args=(keys, store), name="keys", daemon=True).start()

    def agree(num_blocks: int) -> int:
        messages.send(steps, {"num_blocks": np.array(num_blocks)})
        return int(messages.receive(steps)["num_blocks"])

    memory = SharedMemory()
    runner = load_rank(resolve_model(str(Path(hello["model"]))), options, part, store, agree, memory.allocate)
    socket.send_fds(steps, [b"p"], [memory.file])
    memory.close()
    work(runner, part, steps)


def _listen(keys: socket.socket, store: RelayStore) -> None:
    """Takes what other ranks set; ends this process when the worker is gone, whatever it does just then."""
    with contextlib.suppress(OSError):
        while True:
            for key, value in messages.receive(keys).items():
                store.receive(key, value.tobytes())
    os._exit(0)


if __name__ == "__main__":
    main()
