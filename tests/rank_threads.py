"""The ranks of a worker as threads of this process: real groups, real messages, every rank its own runner and pool."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines import OPTIONS, make_engine
from pagewire_core.model_dir import resolve_model
from pagewire_engine.config import EngineConfig
from pagewire_engine.engine import Engine
from pagewire_engine.model_runner import RankRunner
from pagewire_engine.models.part import Part
from pagewire_engine.options import EngineOptions
from pagewire_engine.parallel import messages
from pagewire_engine.parallel.loading import load_rank
from pagewire_engine.parallel.peers import key_store
from pagewire_engine.parallel.pools import JoinedKVCache, Pool, RankPool
from pagewire_engine.parallel.remote_pool import RemotePool, serve_pool
from pagewire_engine.parallel.runner import ParallelRunner, work
from pagewire_transfer.relay_store import RelayStore


class ThreadTeam:
    """As Team, without the processes."""

    def __init__(self, runners: list[RankRunner], parts: list[Part]) -> None:
        self._links = {part.index: socket.socketpair() for part in parts[1:]}
        self._pages = {part.index: socket.socketpair() for part in parts[1:]}
        self._threads = [
            threading.Thread(target=_until_gone, args=(job, *arguments))
            for runner, part in zip(runners[1:], parts[1:], strict=True)
            for job, arguments in (
                (work, (runner, part, self._links[part.index][1])),
                (serve_pool, (runner.cache, self._pages[part.index][1])),
            )
        ]
        for thread in self._threads:
            thread.start()

    def send(self, arrays: messages.Arrays) -> None:
        for link, _ in self._links.values():
            messages.send(link, arrays)

    def receive(self, rank: int) -> messages.Arrays:
        return messages.receive(self._links[rank][0])

    def pages(self, rank: int) -> socket.socket:
        return self._pages[rank][0]

    def close(self) -> None:
        pairs = [*self._links.values(), *self._pages.values()]
        for link, _ in pairs:
            link.close()
        for thread in self._threads:
            thread.join()
        for _, link in pairs:
            link.close()


def _until_gone(job: Callable[..., None], *arguments: Any) -> None:
    with contextlib.suppress(ConnectionError):
        job(*arguments)


@contextlib.contextmanager
def parallel_engine(path: Path, tp: int = 1, pp: int = 1, *, remote: bool = False, **options: Any) -> Iterator[Engine]:
    """As make_engine, of tp * pp ranks. remote: pools of other ranks are reached as those of other GPUs are."""
    if tp * pp == 1:
        yield make_engine(path, **options)
        return
    chosen = EngineOptions(**(OPTIONS | options), tensor_parallel_size=tp, pipeline_parallel_size=pp)
    agreed, least, model = threading.Barrier(tp * pp), [], resolve_model(str(path))

    def agree(num_blocks: int) -> int:
        least.append(num_blocks)
        agreed.wait()
        return min(least)

    with engine_of(lambda part, store: load_rank(model, chosen, part, store, agree), tp, pp, chosen, remote) as engine:
        yield engine


@contextlib.contextmanager
def engine_of(
    make: Callable[[Part, RelayStore], RankRunner], tp: int, pp: int, chosen: EngineOptions, remote: bool = False
) -> Iterator[Engine]:
    """On the runners that `make` gives."""
    parts, store = [Part.of(rank, tp, pp) for rank in range(tp * pp)], key_store(lambda key, value: None, tp * pp)
    with ThreadPoolExecutor(len(parts)) as pool:
        runners = list(pool.map(lambda part: make(part, store), parts))
    config = runners[0].config
    team: Any = ThreadTeam(runners, parts)
    pools: list[Pool] = [runner.cache for runner in runners]
    if remote:
        pools[1:] = [
            RemotePool(team.pages(part.index), part.local(config), runners[0].cache, poison=True) for part in parts[1:]
        ]
    cache = JoinedKVCache(config, [RankPool.of(pool, part, config) for pool, part in zip(pools, parts, strict=True)])
    limits = EngineConfig(
        max_model_len=chosen.max_model_len or config.max_position_embeddings,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        max_num_seqs=chosen.max_num_seqs,
        max_num_batched_tokens=chosen.max_num_batched_tokens,
    )
    runner = ParallelRunner(runners[0], cache, parts[0], team)
    try:
        yield Engine(runner, limits)
    finally:
        runner.close()
