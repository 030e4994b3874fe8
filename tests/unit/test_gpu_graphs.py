"""What a CUDA graph demands of the decode step, checked without a GPU.

A graph replays the same operations on the same addresses: nothing in the step may depend on the values of a tensor,
visit the host, or write to memory that was not there when the graph was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_runners import make_gpu_runner
from pagewire_engine.config import EngineConfig
from pagewire_engine.gpu import decode_step
from pagewire_engine.gpu.decode_step import DecodeStep
from pagewire_engine.gpu.graphs import Recorder
from pagewire_engine.gpu.kv_cache import GpuKVCache
from pagewire_engine.gpu.layer_graphs import SIZES, LayerGraphs
from pagewire_engine.gpu.model import GpuModel
from pagewire_engine.gpu.tables import DeviceTables
from pagewire_engine.gpu.transfers import send, views
from pagewire_engine.models.config import ModelConfig, read_config
from pagewire_engine.quantization import SCHEMES
from pagewire_kernels import torch_ops
from scripted_batches import Script
from tiny_models import ARCHITECTURES, BASE, make_model
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LIMITS = EngineConfig(max_model_len=256, block_size=16, num_blocks=8, max_num_seqs=4, max_num_batched_tokens=40)


HOST = {Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
        Tensor.__index__, Tensor.pin_memory, torch.tensor, torch.as_tensor, torch.from_numpy}  # fmt: skip


class NoVisitToTheHost(TorchFunctionMode):
    """Raises on what would bring a tensor to the host or from there. (FakeTensorMode does, if a value is needed.)"""

    forbidden = HOST

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moved = func is Tensor.to and any(isinstance(a, str | torch.device) for a in (*args, *(kwargs or {}).values()))
        assert func not in self.forbidden and not moved, f"{func} visits the host"
        return func(*args, **(kwargs or {}))


class Shapes:
    """Weights without values."""

    def take(self, name: str, shape: Sequence[int], rows: tuple[int, int] | None = None) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.bfloat16)


def _config(architecture: str) -> ModelConfig:
    hf = BASE | ARCHITECTURES[architecture] | {"architectures": [CLASSES[architecture] + "ForCausalLM"]}
    return read_config(hf, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("scheme", [None, "int8", "fp8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_in_what_graphs_are_made_of_depends_on_values_or_visits_the_host(
    architecture: str, scheme: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole decode step, and any step but its attention, on tensors without values: asking for one is an error.

    Attention is stood in for by its shapes: its plain torch form, which is not what a graph holds, reads lengths.
    """
    monkeypatch.setattr(torch_ops, "paged_decode", lambda q, *_, out, **__: out.copy_(q))
    with FakeTensorMode(), torch.inference_mode():
        config = _config(architecture)
        model = GpuModel(config, Shapes(), 256, SCHEMES[scheme] if scheme else None)
        kv_dtype = torch.float8_e4m3fn if scheme == "fp8" else torch.bfloat16
        cache = GpuKVCache(config, 8, 16, kv_dtype)
        step = DecodeStep(model, cache, 4, 16)
        arrays = {name: np.zeros(4, dtype) for name, dtype in decode_step._DTYPES.items()}
        inputs = views(step._packed, arrays)
        layers = LayerGraphs(model, cache)
        layers.capture(Recorder(config.device), LIMITS.max_num_batched_tokens)
        with NoVisitToTheHost():
            step._compute(inputs, 4)
            for part in layers._graphs[16]:
                part()


@pytest.mark.parametrize(
    ("max_rows", "sizes"), [(2, (16,)), (40, (16, 32, 64)), (64, (16, 32, 64)), (1024, SIZES), (8192, SIZES)]
)
def test_graphs_are_made_for_as_many_rows_as_a_step_may_have(max_rows: int, sizes: tuple[int, ...]) -> None:
    """All sizes once were, with buffers for 1024 rows, whatever --max-num-batched-tokens said."""
    with FakeTensorMode(), torch.inference_mode():
        config = _config("llama")
        layers = LayerGraphs(GpuModel(config, Shapes(), 256, None), GpuKVCache(config, 8, 16, torch.bfloat16))
        assert not layers.takes(1)
        layers.capture(Recorder(config.device), max_rows)
    assert set(layers._graphs) == set(layers.sizes) == set(sizes) and len(layers._hidden) == sizes[-1]
    assert layers.takes(min(max_rows, SIZES[-1])) and not layers.takes(sizes[-1] + 1)


def test_a_launch_visits_the_host_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the step after it could not be queued before it is done: not for penalties, log probabilities or copies.

    The staging memory of an upload is the host's own, and read as such.
    """
    monkeypatch.setattr(torch_ops, "paged_decode", lambda q, *_, out, **__: out.copy_(q))
    monkeypatch.setattr(torch_ops, "paged_prefill", lambda q, *_, out, **__: out.copy_(q))
    monkeypatch.setattr(NoVisitToTheHost, "forbidden", HOST - {Tensor.numpy})
    runner, script = make_gpu_runner(make_model(tmp_path / "llama", "llama")), Script()
    seqs = [script.add(range(5, 30), temperature=0.5, logprobs=i, repetition_penalty=1.1) for i in range(3)]
    runner.launch(script.batch(*((seq, 20) for seq in seqs))).tokens()  # makes the copy of the tables
    with NoVisitToTheHost():
        first = runner.launch(replace(script.batch(*((seq, 5) for seq in seqs)), copies=((60, 61),)))
        second = runner.launch(
            script.batch(*((seq, 1) for seq in seqs), unknown={seq: i for i, seq in enumerate(seqs)})
        )
    assert len(first.tokens()) == len(second.tokens()) == 3


@pytest.mark.parametrize("visit", [lambda t: t.item(), lambda t: t.cpu(), lambda t: t.nonzero(), lambda t: t[t > 0]])
def test_such_a_visit_would_show(visit: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(), NoVisitToTheHost(), pytest.raises((AssertionError, DynamicOutputShapeException)):
        visit(torch.ones(1))


def test_every_step_of_a_size_reads_and_writes_the_same_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two different batches of three and four sequences, both padded to four rows."""
    runner, script = make_gpu_runner(make_model(tmp_path / "llama", "llama")), Script()
    seqs = [script.add(range(5 + i, 12 + 9 * i), temperature=0.5 * i) for i in range(4)]
    for seq in seqs:
        [first] = runner.launch(script.batch((seq, len(seq.tokens)))).tokens()
        seq.tokens.append(first.token)
    seen: list[dict[str, int]] = []
    tokens: list[list[int]] = []
    compute = DecodeStep._compute

    def watched(self: DecodeStep, inputs: dict[str, Tensor], size: int) -> None:
        compute(self, inputs, size)
        given = {"tokens": self._tokens, "logits": self._logits, "block_tables": self._block_tables} | inputs
        seen.append({name: tensor.data_ptr() for name, tensor in given.items()})
        tokens.append(self._tokens[:size].tolist())

    monkeypatch.setattr(DecodeStep, "_compute", watched)
    for chosen in (seqs, seqs[1:]):
        for seq, sampled in zip(chosen, runner.launch(script.batch(*((s, 1) for s in chosen))).tokens(), strict=True):
            seq.tokens.append(sampled.token)
    assert seen[0] == seen[1]
    assert tokens[0] != tokens[1]


def test_a_step_on_old_buffers_gives_what_a_step_on_new_ones_gives(tmp_path: Path) -> None:
    """Replay in miniature: inputs are overwritten in place, the same closure runs, and only they may matter."""
    path = make_model(tmp_path / "llama", "llama")
    outcomes = []
    for used_before in (False, True):
        runner, script = make_gpu_runner(path), Script()
        seqs = [script.add(range(9 + i, 30)) for i in range(4)]
        for seq in seqs:
            [first] = runner.launch(script.batch((seq, len(seq.tokens)))).tokens()
            seq.tokens.append(first.token)
        if used_before:
            step = runner._decode
            with torch.inference_mode():
                for buffer in (step._logits, step._tokens, step._block_tables, step._packed):
                    buffer.fill_(3)
        outcomes.append([s.token for s in runner.launch(script.batch(*((seq, 1) for seq in seqs[:3]))).tokens()])
    assert outcomes[0] == outcomes[1]


def test_what_is_sent_lies_where_arrays_of_that_shape_always_lie() -> None:
    buffer = torch.zeros(256, dtype=torch.uint8)
    first = {"a": np.arange(3, dtype=np.int32), "b": np.array([[0.5, 2.0], [1.0, 3.0]])}
    send(first, buffer)
    found = views(buffer, first)
    assert found["a"].tolist() == [0, 1, 2] and found["b"].tolist() == [[0.5, 2.0], [1.0, 3.0]]
    second = {"a": np.arange(3, 6, dtype=np.int32), "b": first["b"].T}
    send(second, buffer)
    assert found["a"].tolist() == [3, 4, 5] and found["b"].tolist() == [[0.5, 1.0], [2.0, 3.0]]
    assert {n: t.data_ptr() for n, t in found.items()} == {n: t.data_ptr() for n, t in views(buffer, second).items()}


def test_tables_on_the_device_follow_the_rows_that_changed() -> None:
    script, tables = Script(), DeviceTables(torch.device("cpu"))
    a, b = script.add(range(20)), script.add(range(40))
    tables.update(script.batch((a, 20), (b, 40)))
    assert np.array_equal(tables.tables.numpy(), script.tables)
    a.tokens += range(20)
    tables.update(script.batch((a, 20)))
    assert np.array_equal(tables.tables.numpy(), script.tables)
    script.tables[0, 0] += 1  # the engine's own array is not what the device reads
    assert not np.array_equal(tables.tables.numpy(), script.tables)
