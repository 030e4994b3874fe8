"""Speculation in real processes, one prefill and one decode worker: the tokens are those without it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster import SMALL, Cluster, running, script
from engines import Run, make_engine, run_all
from pagewire_core.model_dir import resolve_model
from pagewire_core.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "pagewire-demo"
ASKED = (
    "Repeat: Mia lost her red kite at the river. Mia lost her red kite at the river.",
    "Tell me a long story about a fox.",
    "Count from 3 to 12.",
    "Repeat: Tom frog Zoe honey Tom frog Zoe honey Tom frog Zoe",
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 7, "n": 2},
    {"temperature": 0.8, "seed": 8, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
)
CONFIGS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "draft_model": {"method": "draft_model", "model": str(DEMO), "num_speculative_tokens": 3},
}


def prompts() -> list[list[int]]:
    tokenizer = Tokenizer(DEMO)
    chats = (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ASKED)
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def without_speculation(asked: list[list[int]]) -> list[list[int]]:
    """Our own single process, in the order of the cluster's answers."""
    engine = make_engine(DEMO)
    eos = frozenset(resolve_model(str(DEMO)).eos_token_ids)
    runs = [Run(p, max_tokens=120, eos_token_ids=eos, **params) for p in asked for params in SAMPLINGS]
    run_all(engine, *runs)
    return [run.tokens(choice) for run in runs for choice in range(run.request.n)]


@pytest.mark.parametrize("method", CONFIGS)
async def test_tokens_are_the_same_with_drafts_and_the_metrics_show_them(method: str, tmp_path: Path) -> None:
    asked = prompts()
    expected = without_speculation(asked)
    flags = (*SMALL, f"--speculative-config={json.dumps(CONFIGS[method])}")
    async with running(Cluster(DEMO, tmp_path, worker_flags=flags)) as cluster:
        for _ in range(2):  # the second time from the prefix cache
            answers = await asyncio.gather(
                *(cluster.complete(prompt, max_tokens=120, **params) for prompt in asked for params in SAMPLINGS)
            )
            tokens = [choice["token_ids"] for answer in answers for choice in answer["choices"]]
            assert tokens == expected
        # Alone: however little drafts pay beside each other, some are tried.
        for prompt in asked:
            await cluster.complete(prompt, max_tokens=120)
        await cluster.settle()
        totals = await cluster.metrics()
    drafts, accepted = (totals[f"decode:pagewire_spec_decode_num_{name}_total"] for name in (
        "draft_tokens", "accepted_tokens"))  # fmt: skip
    assert drafts >= accepted > 0
    assert totals["pagewire_spec_decode_num_accepted_tokens_per_pos_total{position=0}"] > 0
    assert totals["pagewire_spec_decode_draft_blocks"] == 0, "the draft model's blocks leaked"
    assert "prefill:pagewire_spec_decode_num_drafts_total" not in totals


async def test_speculate_alone_is_enough(tmp_path: Path) -> None:
    [prompt] = prompts()[1:2]
    async with running(
        Cluster(DEMO, tmp_path, prefill=0, decode=0, both=1, worker_flags=(*SMALL, "--speculate=3"))
    ) as c:
        answer = await c.complete(prompt, max_tokens=120)
        totals = await c.metrics()
    assert answer["choices"][0]["token_ids"] == without_speculation([prompt])[0]
    assert totals["both:pagewire_spec_decode_num_draft_tokens_total"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--speculate=2", '--speculative-config={"method": "ngram"}'], "contradict each other"),
        (['--speculative-config={"method": "eagle3", "num_speculative_tokens": 2}'], "supported are ngram and"),
        (['--speculative-config={"model": "/nowhere", "num_speculative_tokens": 2}'], "no directory /nowhere"),
    ],
)
def test_a_decode_worker_refuses_what_it_cannot_do(flags: list[str], words: str) -> None:
    command = [*script("pagewire-worker"), "--role=decode", f"--model={DEMO}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert words in ended.stderr and ended.stderr.count("\n") == 1
