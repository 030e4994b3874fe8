"""KV between workers of any shape: ranks, stages, pages. On the wire it is the same bytes, so each fits each other.

What a prefill worker of a shape gives is compared with the bytes of one rank with pages of 16; what a decode worker of
a shape makes of these bytes, with one rank's tokens and log probabilities.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ROOT, Run, assert_empty, make_engine
from pagewire_engine.engine import Engine
from pagewire_engine.events import FirstTokens
from pagewire_engine.sampler import Sampled
from pagewire_transfer.wire import to_bytes
from rank_threads import parallel_engine
from tiny_models import make_model

PROMPT = [(7 * i) % 300 + 5 for i in range(70)]
LAYERS = 3
PARAMS: dict[str, Any] = {"temperature": 0.8, "seed": 3, "logprobs": 4, "max_tokens": 8, "ignore_eos": True}

Shape = tuple[int, int, int]  # tensor parallel, pipeline parallel, block size
SHAPES: list[Shape] = [(tp, 1, page) for tp, page in product((1, 2, 4), (16, 32, 64))]
SHAPES += [(1, 2, 32), (2, 2, 64), (1, 3, 16)]


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_a_prompt_computed_by_any_shape_is_continued_by_any_other(kv_heads: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": kv_heads}
    model = make_model(tmp_path, "llama", **sizes)
    alone = make_engine(model)
    whole = Run(PROMPT, **PARAMS)
    alone.submit(whole.request)
    while alone.step():
        pass
    wire, first = prefill(alone)
    assert decode(alone, wire, first).tokens() == whole.tokens()
    for tp, pp, page in SHAPES:
        with parallel_engine(model, tp, pp, block_size=page, remote=(tp, page) == (2, 64)) as engine:
            found, found_first = prefill(engine)
            assert torch.equal(to_bytes(found), to_bytes(wire)) and found_first == first
            again = decode(engine, wire, first)
            assert again.tokens() == whole.tokens() and again.logprobs() == whole.logprobs()
    with parallel_engine(model, 2, 1, block_size=8) as plain:  # plain torch, whose pages have another layout
        found, found_first = prefill(plain)
        assert torch.allclose(found, wire, atol=1e-4) and found_first[0].token == first[0].token
        assert decode(plain, wire, first).tokens() == decode(alone, found, first).tokens() == whole.tokens()


def prefill(engine: Engine) -> tuple[torch.Tensor, tuple[Sampled, ...]]:
    """The prompt's KV in wire layout, gathered in chunks of layers and of tokens that end inside a page; its tokens."""
    run = Run(PROMPT, prefill_only=True, **PARAMS)
    engine.submit(run.request)
    while engine.step():
        engine.check()
    table, cache = engine.block_table(run.request), engine.runner.cache
    tokens = [(0, 37), (37, len(PROMPT))]
    parts = [[cache.gather(table, (i, min(i + 2, LAYERS)), part) for part in tokens] for i in range(0, LAYERS, 2)]
    engine.release(run.request)
    assert_empty(engine)
    engine.blocks.reset_cache()
    assert cache.gather(table, (0, LAYERS), (0, len(PROMPT))).isnan().all(), "every rank has heard that it is free"
    first = run.events[-1]
    assert isinstance(first, FirstTokens)
    return torch.cat([torch.cat(part, 2) for part in parts]), first.tokens


def decode(engine: Engine, wire: torch.Tensor, first: tuple[Sampled, ...]) -> Run:
    """What is generated from the prompt's KV; nothing of it is computed here, and all free pages are NaN."""
    owner, external, cache = object(), engine.external, engine.runner.cache
    assert external.pin_prefix(owner, PROMPT, ROOT) == 0
    table = external.bind(owner, len(PROMPT))
    for layers in [(0, 1), (1, LAYERS)]:
        for begin, end in [(0, 50), (50, len(PROMPT))]:
            cache.scatter(wire[slice(*layers), :, begin:end].contiguous(), table, layers, (begin, end))
    run = Run(PROMPT, **PARAMS)
    computed = engine.counters.prompt_tokens_computed
    engine.start_transferred(run.request, external.unbind(owner), first)
    while engine.step():
        engine.check()
    assert engine.counters.prompt_tokens_computed == computed
    assert_empty(engine)
    engine.blocks.reset_cache()
    return run
