"""A worker is told to fetch a prompt's beginning when that is clearly cheaper than computing it, and only then."""

from __future__ import annotations

import pytest
from pagewire.v1 import common_pb2, prefill_pb2
from pagewire_core.block_events import STORED
from pagewire_core.block_hash import block_hashes, chain_root
from pagewire_core.tokenizer import Tokenizer
from pagewire_router.cost import plans, predict, to_compute
from pagewire_router.fetch import Fetches
from pagewire_router.ledger import Booking
from pagewire_router.links import Links
from pagewire_router.load import Ask, Fetch, Load, Pool, StepModel
from router_scene import request, scene, until

PREFILL, DECODE = common_pb2.WORKER_ROLE_PREFILL, common_pb2.WORKER_ROLE_DECODE
SLOW = StepModel(prefill_ms_per_token=1.0)


def load(name: str, role: int = PREFILL, **facts: object) -> Load:
    options = {"fingerprint": b"f" * 32, "kv_bytes_per_token": 1000, "model": SLOW, **facts}
    return Load(name, role, **options)  # type: ignore[arg-type]


def fetch_of(held: dict[str, int], *loads: Load, prompt: int = 1000, links: Links | None = None) -> Fetch | None:
    """What "p" is to fetch."""
    by_name = {w.worker_id: w for w in loads}
    return Fetches(Ask(prompt), by_name, held, links or Links())(by_name["p"]).fetch


def test_much_is_fetched_and_little_is_computed() -> None:
    found = fetch_of({"q": 512}, load("p"), load("q", hit_tokens=512))
    assert found is not None and (found.holder, found.tokens) == ("q", 512)
    assert found.saved_ms == pytest.approx(512) and found.ms < 20
    assert fetch_of({"q": 64}, load("p", model=StepModel()), load("q", hit_tokens=64)) is None
    assert fetch_of({}, load("p"), load("q")) is None


def test_the_holder_of_the_longest_prefix_is_asked_unless_its_link_is_slow() -> None:
    holders = load("q", hit_tokens=512), load("r", hit_tokens=768)
    links = Links()
    found = fetch_of({"q": 512, "r": 768}, load("p"), *holders, links=links)
    assert found is not None and found.holder == "r"
    for _ in range(2):  # the first opens the lane
        links.observe("r", "p", 1_000_000, 10.0)
    found = fetch_of({"q": 512, "r": 768}, load("p"), *holders, links=links)
    assert found is not None and found.holder == "q"


def test_what_is_not_there_yet_or_of_another_model_or_here_already_is_not_fetched() -> None:
    assert fetch_of({"q": 0}, load("p"), load("q", hit_tokens=512)) is None, "only on its way to the holder"
    assert fetch_of({"q": 512}, load("p"), load("q", hit_tokens=512, fingerprint=b"g" * 32)) is None
    assert fetch_of({"q": 512}, load("p", hit_tokens=512), load("q", hit_tokens=512)) is None
    assert fetch_of({"p": 512}, load("p", hit_tokens=512)) is None


def test_a_fetch_is_a_term_of_the_cost() -> None:
    ask, links = Ask(1000), Links()
    loads = {w.worker_id: w for w in (load("p"), load("q", hit_tokens=512, waiting_tokens=10_000), load("d", DECODE))}
    best = plans(ask, Pool.of(list(loads.values()), ask), links)[0]
    assert best.prefill == "p" and "fetch" not in best.terms
    fetching = Fetches(ask, loads, {"q": 512}, links)
    with_fetch = plans(ask, Pool.of(list(loads.values()), ask, fetching=fetching), links)[0]
    computing = fetching(loads["p"])
    fetch = computing.fetch
    assert fetch is not None and with_fetch.prefill == "p"
    assert with_fetch.terms["fetch"] == fetch.ms and with_fetch.cost < best.cost
    assert to_compute(ask, computing) == (488, 512)
    saved = predict(ask, loads["p"], loads["d"], links).ttft_ms - predict(ask, computing, loads["d"], links).ttft_ms
    assert saved == pytest.approx(fetch.saved_ms - fetch.ms)


async def test_the_worker_that_computes_is_told_whom_to_ask(byte_tokenizer: Tokenizer) -> None:
    prompt = "the quick brown fox " * 10  # 200 tokens: three whole blocks
    async with scene(byte_tokenizer, "p1 p2 d1") as s:
        hashes = block_hashes(chain_root(b"f" * 32), s.ids(prompt))
        await until(lambda: "p2" in s.router.index.worker_ids)
        s.router.index.apply("p2", 1, [(STORED, hashes)])
        busy = s.router.services.workers.get("p2")
        assert busy is not None
        with busy.booked(Booking(compute_tokens=50_000)):
            explained = await s.stub.Explain(request(prompt))
            best = next(c for c in explained.candidates if c.may_be_chosen)
            assert best.prefill_worker == "p1" and "fetch" in {term.name for term in best.terms}
            answer = await s.ask(prompt)
        assert answer.summary is not None and answer.summary.prefill_worker == "p1"
        [asked] = [r for r in s.workers["p1"].requests if isinstance(r, prefill_pb2.PrefillRequest)]
        assert (asked.holder.worker_id, asked.holder.tokens) == ("p2", 192)
        assert asked.holder.address == s.workers["p2"].address and asked.holder.timeout_s > 0
        await s.settle()
