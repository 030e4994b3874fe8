"""vLLM's generative scores on real workers: the probabilities that transformers has, and no token is decoded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from cluster import Cluster, running
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUERY, ITEMS, LABELS = [5, 9, 200], [[17], list(range(20, 120))], [7, 300, 9]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("scoring")
    model = make_model(directory / "model", "qwen3")
    async with running(Cluster(model, directory, router_flags=("--served-model-name=demo",))) as started:
        yield started


def reference(model: Path, prompt: list[int]) -> torch.Tensor:
    """Log probabilities of the next token in transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return loaded(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


async def scored(cluster: Cluster, **body: Any) -> httpx.Response:
    return await cluster.http.post("/generative_scoring", json=body)


def scores(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [(one["index"], one["object"]) for one in data] == [(i, "score") for i in range(len(data))]
    return [one["score"] for one in data]


async def test_a_score_is_the_first_labels_share_of_the_labels_or_its_probability(cluster: Cluster) -> None:
    told = [reference(cluster.model, QUERY + item) for item in ITEMS]
    asked = {"query": QUERY, "items": ITEMS, "label_token_ids": LABELS}
    shares = [row[LABELS].softmax(-1)[0].item() for row in told]
    assert scores(await scored(cluster, **asked)) == pytest.approx(shares, rel=1e-4)
    alone = [row[LABELS[0]].exp().item() for row in told]
    assert scores(await scored(cluster, **asked, apply_softmax=False)) == pytest.approx(alone, rel=1e-4)


async def test_a_label_may_be_named_twice_or_end_the_text(cluster: Cluster) -> None:
    end = AutoTokenizer.from_pretrained(cluster.model).eos_token_id
    row = reference(cluster.model, QUERY + ITEMS[0])
    found = await scored(cluster, query=QUERY, items=ITEMS[:1], label_token_ids=[end, 7, end])
    assert scores(found) == pytest.approx([row[[end, 7]].softmax(-1)[0].item()], rel=1e-4)


async def test_texts_make_tokens_each_by_itself_and_special_ones_for_the_query_alone(cluster: Cluster) -> None:
    tokenizer = AutoTokenizer.from_pretrained(cluster.model)
    query, item = tokenizer.encode("Is it a city?"), tokenizer.encode(" Tokyo", add_special_tokens=False)
    body = {"query": "Is it a city?", "items": [" Tokyo"], "label_token_ids": [7]}
    for item_first, prompt in ((False, query + item), (True, item + query)):
        found = await scored(cluster, **body, item_first=item_first, apply_softmax=False)
        assert scores(found) == pytest.approx([reference(cluster.model, prompt)[7].exp().item()], rel=1e-4)
        assert found.json()["usage"]["prompt_tokens"] == len(prompt)


async def test_the_answer_is_vllms_and_no_kv_leaves_the_prefill_worker(cluster: Cluster) -> None:
    found = await scored(cluster, query=QUERY, items=ITEMS, label_token_ids=LABELS, cache_salt="scores", use_beams=1)
    body = found.json()
    assert body["id"].startswith("generative-scoring-") and body["object"] == "list" and body["model"] == "demo"
    assert {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": 107, "completion_tokens": 2, "total_tokens": 109,
    }  # fmt: skip
    assert found.headers["x-pagewire-ignored-fields"] == "use_beams"
    assert found.headers["x-pagewire-transferred-bytes"] == "0"


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"items": []}, "items"),
        ({"items": [[]], "query": []}, "items"),
        ({"label_token_ids": []}, "label_token_ids"),
        ({"label_token_ids": [10**6]}, "label_token_ids"),
        ({"query": 5}, "query"),
        ({"model": "unknown"}, "model"),
        ({"items": [[5] * 5000]}, "items"),
        ({"items": ["x" * (1 << 20 | 1)]}, "items"),
        ({"query": "x" * (1 << 20 | 1)}, "query"),
    ],
)
async def test_bad_input_is_refused_by_the_name_of_its_field(
    cluster: Cluster, changed: dict[str, Any], param: str
) -> None:
    refused = await scored(cluster, **{"query": QUERY, "items": ITEMS, "label_token_ids": LABELS, **changed})
    assert refused.status_code == (404 if param == "model" else 400), refused.text
    error = refused.json()["error"]
    assert error["param"].split("[")[0].split(".")[0] == param, error
