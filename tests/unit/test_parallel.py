"""Several ranks against one: the same tokens, and the same bits where the compiled step runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from engines import Run, make_engine, run_all
from hypothesis import given
from hypothesis import strategies as st
from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import StartupError
from pagewire_core.grammar import Vocabulary
from pagewire_engine.constraint import Constraints
from pagewire_engine.engine import Engine
from pagewire_engine.models.part import Part
from pagewire_engine.parallel.peers import GroupPeers, key_store
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.ngram_proposer import NgramProposer
from pagewire_engine.speculative.policy import Policy, Rates
from pagewire_engine.speculative.step_times import Counts
from rank_threads import parallel_engine


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * i + 11 * seed) % 300 + 5 for i in range(length)]


def answers(path: Path, tp: int, pp: int, **options: Any) -> list[Any]:
    """Chunks, decode rows beside them, copied blocks, drawn tokens, changed logits, a mask's worth of each."""
    with parallel_engine(path, tp, pp, **options) as engine:
        runs = [
            Run(prompt(90), logprobs=5),
            Run(prompt(9, 1), n=3, temperature=1.0, seed=4, top_p=0.9),
            Run(prompt(50, 2), temperature=0.7, seed=1, repetition_penalty=1.3, logit_bias={40: 3.0}, logprobs=0),
            Run(prompt(1, 3)),
        ]
        run_all(engine, *runs)
        return [[(run.tokens(i), run.logprobs(i)) for i in range(run.request.n)] for run in runs]


CASES: list[tuple[str, dict[str, Any], list[tuple[int, int]]]] = [
    ("llama", {"dtype": "float32"}, [(4, 1), (2, 2)]),  # one kv head, which all ranks hold
    ("qwen2", {"dtype": "bfloat16"}, [(2, 1), (1, 3)]),
    ("qwen3", {"dtype": "bfloat16", "quantization": "int8"}, [(2, 1), (1, 2)]),
    ("mistral", {"dtype": "float32", "block_size": 64}, [(4, 1)]),
]


@pytest.mark.parametrize(("architecture", "options", "shapes"), CASES)
def test_the_bits_are_those_of_one_rank(
    architecture: str, options: dict[str, Any], shapes: list[tuple[int, int]], tmp_path: Path
) -> None:
    """shapes: tensor and pipeline parallel. An odd intermediate size, that no number of ranks divides."""
    model = tiny_models.make_model(tmp_path, architecture, intermediate_size=100)
    expected = answers(model, 1, 1, **options)
    for shape in shapes:
        assert answers(model, *shape, **options) == expected


def test_int4_weights_of_a_rank_are_its_share_of_the_whole_models(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32}
    model = tiny_models.make_model(tmp_path, "llama", **sizes)
    expected = answers(model, 1, 1, quantization="int4")
    for shape in [(2, 1), (2, 2)]:
        assert answers(model, *shape, quantization="int4") == expected


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_on_plain_torch_the_tokens_are_those_of_one_rank(
    tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of another shape may round otherwise there."""
    monkeypatch.setenv("PAGEWIRE_KERNELS", "torch")
    model = tiny_models.make_model(tmp_path, "qwen3")
    for found, expected in zip(answers(model, tp, pp), answers(model, 1, 1), strict=True):
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]


class Always(Policy):
    """Every draft is tried, however fast this machine is today."""

    def choose(self, num_sequences: int, rates: Rates, limits: Counts) -> Counts:
        return limits


def test_drafts_and_grammars_are_every_ranks(tmp_path: Path) -> None:
    """Masks and rows of draft tokens against one rank that knows no drafts; a text that repeats itself is guessed."""
    model = tiny_models.make_model(tmp_path, "llama")
    constraints = Constraints(Vocabulary(model, tiny_models.VOCAB, [2]))

    def asked() -> list[Run]:
        runs = [Run(prompt(40), max_tokens=40, constrained=True, eos_token_ids=frozenset({2}), temperature=t, seed=7)
                for t in (0.0, 1.0)]  # fmt: skip
        for run in runs:
            run.request.matchings = constraints.make_now(pb.Constraint(answer="start: /(abc|abd){2,30}x/"))
        return [*runs, Run(prompt(9) * 6, max_tokens=30, logprobs=1, ignore_eos=True)]

    alone, together = asked(), asked()
    run_all(make_engine(model), *alone)
    with parallel_engine(model, 2, 2) as engine:
        proposer = NgramProposer(SpeculativeConfig("ngram", 4, prompt_lookup_max=3, prompt_lookup_min=1), 256)
        proposer.policy = Always()
        speculating = Engine(engine.runner, engine.config, proposer=proposer)
        run_all(speculating, *together)
        assert speculating.counters.accepted_tokens > 0
    assert [(run.tokens(), run.logprobs()) for run in together] == [(run.tokens(), run.logprobs()) for run in alone]


def test_groups_of_many_ranks_come_up() -> None:
    """The keys of nine ranks were more than two peers of a transfer may set, and the worker did not start."""
    store = key_store(lambda key, value: None, 9)

    def gathered(part: Part) -> list[float]:
        mine = torch.full((1, 1), float(part.index))
        peers = GroupPeers(part, store, mine.device)
        passed = torch.full((1, 1), -1.0)
        if not part.is_first:
            peers.receive(passed)
        if not part.is_last:
            peers.send(mine)
        return [*peers.gather(mine, [1] * part.ranks)[0].tolist(), passed.item()]

    with ThreadPoolExecutor(9) as pool:
        told = list(pool.map(gathered, [Part.of(index, 3, 3) for index in range(9)]))
    assert told[:3] == [[0.0, 1.0, 2.0, -1.0]] * 3
    assert told[7] == [6.0, 7.0, 8.0, 4.0]


@given(total=st.integers(1, 4000), ranks=st.integers(1, 8), unit=st.sampled_from([16, 32]))
def test_every_output_belongs_to_one_rank(total: int, ranks: int, unit: int) -> None:
    shares = [Part(rank, ranks).outputs(total, unit) for rank in range(ranks)]
    assert shares[0][0] == 0 and shares[-1][1] == total
    assert all(end == begin for (_, end), (begin, _) in pairwise(shares))
    assert all(begin % unit == 0 or begin == total for begin, _ in shares)
    assert Part(0, ranks).widths(total, unit) == [end - begin for begin, end in shares]


SIX_HEADS = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}


@pytest.mark.parametrize(
    ("tp", "pp", "sizes", "reason"),
    [
        (3, 1, {}, "--tensor-parallel-size 3 does not divide the model's 4 attention heads"),
        (4, 1, SIX_HEADS, "6 key-value heads: neither divides the other"),
        (4, 1, {"intermediate_size": 48}, "too much for a model with so few as 48 outputs"),
        (1, 4, {}, "--pipeline-parallel-size 4 is more than the model's 3 layers"),
    ],
)
def test_a_model_that_cannot_be_divided_so_is_refused(
    tp: int, pp: int, sizes: dict[str, int], reason: str, tmp_path: Path
) -> None:
    model = tiny_models.make_model(tmp_path, "llama", **sizes)
    with pytest.raises(StartupError, match=reason):
        make_engine(model, tensor_parallel_size=tp, pipeline_parallel_size=pp)
