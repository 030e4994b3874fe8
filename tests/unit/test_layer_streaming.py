"""KV leaves a prefill worker while the step that computes it still runs: layer by layer, and no layer too early."""

from __future__ import annotations

import random
import select
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, make_engine, run_all
from pagewire_engine import layer_stream
from pagewire_engine.cpu.runner import CpuRunner
from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, FirstTokens, Progress
from pagewire_engine.model_runner import TorchRunner
from peers import hand_over, peer
from rank_threads import parallel_engine
from tiny_models import VOCAB, make_model

LAYERS = 12
LENGTH = 200
OPTIONS: dict[str, Any] = {"max_num_batched_tokens": 256, "kv_cache_memory_bytes": 32 << 20, "threads": 1}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its steps take long enough for another thread to see one run."""
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 256, "intermediate_size": 768}
    return make_model(tmp_path_factory.mktemp("deep"), "llama", **sizes)


@pytest.fixture(autouse=True)
def every_group_is_worth_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_stream, "GROUP_BYTES", 1)


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(5, VOCAB) for _ in range(LENGTH)]


def told_while_running(engine: Engine, prompt: list[int]) -> list[tuple[Progress, torch.Tensor]]:
    """Runs the prompt; what was said ahead of its steps' ends, each with the KV that was there at that moment."""
    copies: list[tuple[Progress, torch.Tensor]] = []
    over = threading.Event()

    def emit(event: Event) -> None:
        if isinstance(event, Progress) and event.ahead[1]:
            table, (end, layers) = request.sequences[0].block_table, event.ahead
            copies.append((event, engine.runner.cache.gather(table, (0, layers), (event.num_computed, end))))
        if isinstance(event, FirstTokens):
            over.set()

    request = Run(prompt, prefill_only=True).request
    request.emit = emit
    engine.layers.enabled = True

    def listen() -> None:
        while not over.is_set():
            if select.select([engine.runner.progress], [], [], 0.01)[0]:
                engine.tell_layers()

    listener = threading.Thread(target=listen)
    listener.start()
    engine.submit(request)
    while engine.step():
        pass
    listener.join()
    final = engine.runner.cache.gather(request.sequences[0].block_table, (0, LAYERS), (0, LENGTH))
    for event, copy in copies:
        end, layers = event.ahead
        assert torch.equal(copy, final[:layers, :, event.num_computed : end]), f"{event} was not final"
    engine.cancel(request)
    assert engine.blocks.num_held == 0
    return copies


@pytest.mark.parametrize("kind", [CpuRunner, TorchRunner])
@pytest.mark.parametrize("chunk", [256, 128])
def test_what_is_said_to_be_final_is_what_the_step_leaves(
    kind: type, chunk: int, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is TorchRunner:
        monkeypatch.setenv("PAGEWIRE_KERNELS", "torch")
    engine = make_engine(deep, **(OPTIONS | {"max_num_batched_tokens": chunk}))
    assert isinstance(engine.runner, kind)
    told = []
    for seed in range(50):
        told += told_while_running(engine, prompt(seed))
        if any(event.num_computed for event, _ in told) or (chunk == 256 and told):
            return
    raise AssertionError("nothing was told while a step ran")


@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (2, 2)])
def test_a_layer_is_final_when_all_ranks_have_it(tp: int, pp: int, deep: Path) -> None:
    """Rank 0 tells, and the KV is in the other ranks' pools as well; of a second stage's layers nothing is told."""
    with parallel_engine(deep, tp, pp, **OPTIONS) as engine:
        for seed in range(50):
            if told := told_while_running(engine, prompt(seed)):
                assert all(event.ahead[1] <= LAYERS // pp for event, _ in told)
                return
    raise AssertionError("nothing was told while a step ran")


@pytest.mark.parametrize("lane", ["shm", "gloo", "grpc"])
async def test_layers_that_cross_before_the_first_token_give_the_same_tokens(lane: str, deep: Path) -> None:
    """One step computes each prompt, so only layers of it can be on their way before its end."""
    reference = make_engine(deep, **OPTIONS)
    async with (
        peer(deep, "prefill", lane=lane, chunk_bytes=16 << 10, **OPTIONS) as source,
        peer(deep, "decode", lane=lane, **OPTIONS) as target,
    ):
        for seed in range(50):
            run = Run(prompt(seed), ignore_eos=True)
            run_all(reference, run)
            answer = await hand_over(prompt(seed), source, target)
            assert answer.tokens == run.tokens()
            assert answer.sent.transferred_bytes == LENGTH * source.engine.runner.cache.bytes_per_token > 0
            if answer.sent.overlap > 0:
                break
        assert answer.sent.overlap > 0, "nothing crossed while a step ran"
        assert source.metric("overlap_ratio_sum", lane=lane) > 0
        assert source.metric("tail_seconds_count", lane=lane) == seed + 1
        await source.assert_empty()
        await target.assert_empty()
