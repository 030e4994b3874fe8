"""What a proposer keeps of sequences, and that nothing of it stays, whoever ends them and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import pytest
from hash_model import HashRunner
from pagewire_core.block_hash import PageKeys
from pagewire_engine.batch import Batch
from pagewire_engine.config import EngineConfig
from pagewire_engine.sampler import NO_TOKEN
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request, Sequence
from pagewire_engine.speculative import ngram_proposer
from pagewire_engine.speculative.config import SpeculativeConfig
from pagewire_engine.speculative.draft_model import DraftModel
from pagewire_engine.speculative.draft_proposer import DraftProposer
from pagewire_engine.speculative.ngram_proposer import NgramProposer
from pagewire_engine.speculative.policy import Policy, Rates
from pagewire_engine.speculative.proposer import SpeculativeProposer
from pagewire_engine.speculative.step_times import Counts

LIMITS = EngineConfig(96, 16, 40, 8, 64)


class Always(Policy):
    def choose(self, num_sequences: int, rates: Rates, limits: Counts) -> Counts:
        return limits


class HeldUp(HashRunner):
    """A step takes until it is let go."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entered, self.let_go = threading.Event(), threading.Event()

    def launch(self, batch: Batch) -> Any:
        self.entered.set()
        assert self.let_go.wait(10)
        return super().launch(batch)


def make_target(tokens: list[int], max_tokens: int = 50) -> Sequence:
    request = Request("test", tokens, b"r" * 32, SamplingParams(max_tokens=max_tokens), 1, lambda event: None)
    return Sequence(request, 0, list(tokens), len(tokens), PageKeys(request.cache_root, 16))


def make_proposer(method: str, runner: HashRunner | None = None) -> SpeculativeProposer:
    config = SpeculativeConfig(method, 4, 3, 1)
    proposer: SpeculativeProposer = (
        NgramProposer(config, LIMITS.max_model_len)
        if method == "ngram"
        else DraftProposer(config, LIMITS.max_model_len, DraftModel(runner or HashRunner(40, 16), LIMITS))
    )
    proposer.policy = Always()
    return proposer


def num_known(proposer: SpeculativeProposer) -> int:
    """Sequences of which anything is kept."""
    own = proposer._indexes if isinstance(proposer, NgramProposer) else proposer._model.cache._sequences  # type: ignore[attr-defined]
    assert len(own) == len(proposer._predictions)
    return len(own)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_what_has_ended_is_forgotten(method: str) -> None:
    proposer, seqs = make_proposer(method), [make_target([1, 2] * 10) for _ in range(3)]
    assert all(len(draft) == 4 for draft in proposer.propose(seqs))
    assert num_known(proposer) == 3
    for seq in seqs:
        proposer.ended(seq)
        proposer.ended(seq)
    assert num_known(proposer) == 0 == proposer.num_held_blocks


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_a_sequence_that_ended_before_its_turn_is_not_taken_up_again(method: str) -> None:
    """The engine lists its sequences, one is cancelled, and only then the proposer sees the list."""
    proposer, seq, other = make_proposer(method), make_target([1, 2] * 20), make_target([3, 4] * 20)
    seq.finished = True
    proposer.ended(seq)
    assert [len(draft) for draft in proposer.propose([seq, other])] == [0, 4]
    proposer.ended(other)
    assert num_known(proposer) == 0


def test_a_client_that_leaves_does_not_wait_for_the_draft_model() -> None:
    """`ended` comes from the servicer's thread: it must not stand still while a step runs."""
    runner = HeldUp(40, 16)
    proposer, seq = make_proposer("draft_model", runner), make_target([1, 2] * 20)
    thread = threading.Thread(target=proposer.propose, args=([seq],))
    thread.start()
    assert runner.entered.wait(10)
    proposer.ended(seq)
    assert num_known(proposer) == 0 or thread.is_alive()
    runner.let_go.set()
    thread.join(10)
    assert num_known(proposer) == 0 == proposer.num_held_blocks


@pytest.mark.parametrize(("max_tokens", "drafts"), [(50, 4), (3, 2), (2, 1), (1, 0)])
def test_no_more_is_proposed_than_can_be_said(max_tokens: int, drafts: int) -> None:
    proposer = make_proposer("ngram")
    assert [len(draft) for draft in proposer.propose([make_target([1, 2] * 20, max_tokens)])] == [drafts]


def test_what_has_been_said_counts_in_what_can_be_said() -> None:
    proposer, seq = make_proposer("ngram"), make_target([1, 2] * 20, max_tokens=5)
    seq.tokens += [1, 2]
    assert [len(draft) for draft in proposer.propose([seq])] == [2]


def test_a_step_takes_as_long_as_it_is_since_its_drafts_were_asked_for() -> None:
    """What the host does for a step is saved with it."""
    proposer, told = make_proposer("ngram"), list[tuple[int, int, float]]()
    proposer.policy.observe = lambda *args: told.append(args)  # type: ignore[method-assign, assignment]
    proposer.propose([make_target([1, 2] * 20)])
    time.sleep(0.02)
    proposer.observe(proposed=4, accepted=2, num_sequences=1, milliseconds=1.0)
    [(num_sequences, num_drafts, milliseconds)] = told
    assert (num_sequences, num_drafts) == (1, 4) and 20 <= milliseconds < 5000


def test_no_more_is_proposed_than_fits_the_model() -> None:
    proposer = make_proposer("ngram")
    assert [len(draft) for draft in proposer.propose([make_target([1, 2] * 47)])] == [1]


def test_a_long_prompt_is_indexed_over_several_steps_and_those_behind_it_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_proposer, "_INDEXED_PER_STEP", 8)
    proposer, seqs = make_proposer("ngram"), [make_target([1, 2] * 10), make_target([3, 4] * 5)]
    drafts = [[len(draft) for draft in proposer.propose(seqs)] for _ in range(4)]
    assert drafts == [[0, 0], [0, 0], [4, 0], [4, 4]]


class Scripted:
    """A draft model that says what it is told to, to as many as ask."""

    def __init__(self, *said: list[list[int]] | Exception) -> None:
        self.said, self.asked = list(said), list[list[Sequence]]()
        self.dropped: list[Sequence] = []
        self.cache: Any = SimpleNamespace(drop=self.dropped.append)

    def draft(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        self.asked.append([seq for seq, _ in wanted])
        said = self.said.pop(0)
        if isinstance(said, Exception):
            raise said
        time.sleep(0.01)
        return said


def scripted(*said: list[list[int]] | Exception) -> tuple[DraftProposer, Scripted]:
    model: Any = Scripted(*said)
    proposer = DraftProposer(SpeculativeConfig("draft_model", 4), LIMITS.max_model_len, model)
    proposer.policy = Always()
    return proposer, model


@pytest.mark.parametrize("failure", [[[5, NO_TOKEN], [8, 9]], RuntimeError("a bug")])
def test_a_sequence_for_which_drafting_failed_is_not_drafted_for_again(failure: Any) -> None:
    """The next draft would fail of the same; its pages are of no use."""
    proposer, model = scripted(failure, [[7]])
    seqs = [make_target([1, 2]), make_target([3, 4])]
    failed = seqs[:1] if isinstance(failure, list) else seqs
    assert proposer.propose(seqs) == ([[], [8, 9]] if isinstance(failure, list) else [[], []])
    assert model.dropped == failed
    proposer.propose(seqs)
    assert model.asked[1:] == ([seqs[1:]] if isinstance(failure, list) else [])
    for seq in seqs:
        proposer.ended(seq)
    assert not proposer._failed, "a set of what has long ended"


def test_the_time_that_drafting_takes_counts_by_its_longest_draft() -> None:
    proposer, _ = scripted([[7], [8, 9, 10]], [[], []])
    took: list[tuple[int, int, float]] = []
    proposer.policy.times.add_drafting = lambda *args: took.append(args)  # type: ignore[method-assign, assignment]
    seqs = [make_target([1, 2]), make_target([3, 4])]
    proposer.propose(seqs)
    [(num_sequences, longest, milliseconds)] = took
    assert (num_sequences, longest) == (2, 3) and 10 <= milliseconds < 5000
    proposer.propose(seqs)
    assert len(took) == 1, "nothing was drafted"


def test_drafts_that_come_true_are_expected_to_again() -> None:
    proposer, _ = scripted([[7, 8, 9], [7, 8, 9]], [[5], [5]])
    right, wrong = make_target([1, 2]), make_target([3, 4])
    proposer.propose([right, wrong])
    rate = proposer._predictions[right].rate
    right.tokens += [7, 8, 9, 10]
    wrong.tokens += [1]
    proposer.propose([right, wrong])
    assert proposer._predictions[right].rate > rate > proposer._predictions[wrong].rate
