"""A rank of a worker other than the first: `python -m pagewire_engine.parallel.rank RANK STEPS_FD KEYS_FD PAGES_FD`.

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
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model
from pagewire_core.telemetry import configure_logging
from pagewire_transfer.relay_store import RelayStore

from pagewire_engine.kv_cache import KVCache
from pagewire_engine.models.part import Part
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel import messages
from pagewire_engine.parallel.loading import load_rank
from pagewire_engine.parallel.peers import key_store
from pagewire_engine.parallel.pools import SharedMemory
from pagewire_engine.parallel.remote_pool import serve_pool
from pagewire_engine.parallel.runner import work
from pagewire_engine.parallel.team import BEAT_S, EXIT_CODE


def main() -> None:
    rank, *links = int(sys.argv[1]), *(socket.socket(fileno=int(file)) for file in sys.argv[2:5])
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the worker decides when this rank ends
    configure_logging(f"rank-{rank}", "auto", "warning")
    try:
        _run(rank, *links)
    except ConnectionError:
        os._exit(0)  # the worker has ended
    except StartupError as error:
        sys.stderr.write(f"pagewire-worker: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def _run(rank: int, steps: socket.socket, keys: socket.socket, pages: socket.socket) -> None:
    hello = json.loads(messages.receive(steps)["hello"].tobytes())
    options = EngineOptions(**hello["options"] | {"cpus": tuple(hello["options"]["cpus"])})
    part = Part.of(rank, options.tensor_parallel_size, options.pipeline_parallel_size)
    telling = threading.Lock()

    def tell(arrays: messages.Arrays) -> None:
        with telling:
            messages.send(keys, arrays)

    store = key_store(lambda key, value: tell({key: np.frombuffer(value, np.uint8)}), options.num_ranks)
    threading.Thread(target=_listen, args=(keys, store), name="keys", daemon=True).start()
    threading.Thread(target=_beat, args=(tell,), name="beat", daemon=True).start()

    def agree(num_blocks: int) -> int:
        messages.send(steps, {"num_blocks": np.array(num_blocks)})
        return int(messages.receive(steps)["num_blocks"])

    memory = SharedMemory()
    runner = load_rank(resolve_model(str(Path(hello["model"]))), options, part, store, agree, memory.allocate)
    if runner.config.device.type == "cpu":
        socket.send_fds(steps, [b"p"], [memory.file])
    else:
        threading.Thread(target=_serve, args=(runner.cache, pages), name="pages", daemon=True).start()
    memory.close()
    work(runner, part, steps)


def _beat(tell: Callable[[messages.Arrays], None]) -> None:
    with contextlib.suppress(OSError):
        while True:
            tell({})
            time.sleep(BEAT_S)


def _serve(cache: KVCache, pages: socket.socket) -> None:
    """A rank that cannot answer must not leave its worker waiting."""
    try:
        serve_pool(cache, pages)
    except ConnectionError:
        os._exit(0)
    except Exception:
        traceback.print_exc()
        os._exit(EXIT_CODE)


def _listen(keys: socket.socket, store: RelayStore) -> None:
    """Takes what other ranks set; ends this process when the worker is gone, whatever it does just then."""
    with contextlib.suppress(OSError):
        while True:
            for key, value in messages.receive(keys).items():
                store.receive(key, value.tobytes())
    os._exit(0)


if __name__ == "__main__":
    main()
