"""A second, smaller model that says what the target is likely to say: greedy, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from pagewire_engine.batch import Batch
from pagewire_engine.config import EngineConfig
from pagewire_engine.model_runner import Launched, Runner
from pagewire_engine.sampler import NO_TOKEN, Sampled, SampleRow
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Sequence
from pagewire_engine.speculative.draft_cache import DraftCache, DraftSequence

_GREEDY = SamplingParams(temperature=0.0)
_CATCH_UP = 256  # prompt tokens computed in one step, of all sequences: bounds how long decoding waits


@dataclass(frozen=True)
class _Rows:
    """One sequence's part of a step: its input ids; `count`: drafts it gets in all, 0: it is only caught up with."""

    seq: DraftSequence
    input_ids: Seq[int]
    count: int


class DraftModel:
    """Runs in the engine's thread, between its steps. config: of the draft model's own pool."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self._runner, self._config = runner, config
        self.cache = DraftCache(config, runner.cache)

    def draft(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """Up to so many greedy tokens after each sequence, with NO_TOKEN where its logits were not numbers.

        None for one that is still being caught up with, for which there are no blocks, or that is longer
        than this model can be.
        """
        drafts: dict[Sequence, list[int]] = {seq: [] for seq, _ in wanted}
        steps = self._launch_all(self._first_step(wanted))
        for rows, result in steps:
            sampled = result if isinstance(result, list) else result.tokens()
            for row, choice in zip((row for row in rows if row.count), sampled, strict=True):
                drafts[row.seq.target].append(choice.token)
        for row in steps[0][0] if steps else ():
            if row.count:
                row.seq.num_tokens = len(row.seq.target.tokens)
                row.seq.drafted = drafts[row.seq.target][: row.count - 1]
        return [drafts[seq] for seq, _ in wanted]

    def _first_step(self, wanted: Seq[tuple[Sequence, int]]) -> list[_Rows]:
        """The tokens that the draft model has not seen, as many as a step may have."""
        behind, room = _CATCH_UP, self._config.max_num_batched_tokens
        rows: list[_Rows] = []
        for target, count in wanted[: self._config.max_num_seqs]:
            seq = self.cache.settle(target)
            num_tokens = len(target.tokens)
            count = min(count, self._config.max_model_len - num_tokens + 1)
            is_behind = seq.num_uncomputed > self._config.block_size
            chunk = min(seq.num_uncomputed, room, behind if is_behind else room)
            if count < 1 or not chunk:
                continue
            end = seq.num_computed + chunk
            if end < num_tokens:
                count = 0
            if not self.cache.grow(seq, end + max(count - 1, 0)):
                continue
            room -= chunk
            behind -= chunk if is_behind else 0
            rows.append(_Rows(seq, target.tokens[seq.num_computed : end], count))
        return rows

    def _launch_all(self, rows: list[_Rows]) -> list[tuple[list[_Rows], list[Sampled] | Launched]]:
        """The first step and one more per further draft, each over the sequences that want it still.

        A runner that overlaps takes the next ids from its own last step; nothing is read before the end.
        """
        steps: list[tuple[list[_Rows], list[Sampled] | Launched]] = []
        length = 0
        while rows:
            length += 1
            rows.sort(key=lambda row: len(row.input_ids) > 1)
            launched = self._runner.launch(self._batch(rows))
            result: list[Sampled] | Launched = launched if self._runner.overlaps else launched.tokens()
            steps.append((rows, result))
            ready = [row for row in rows if row.count]
            if isinstance(result, list):
                more = [(row, s.token) for row, s in zip(ready, result, strict=True) if s.token != NO_TOKEN]
            else:
                more = [(row, -1 - i) for i, row in enumerate(ready)]
            rows = [_Rows(row.seq, [token], row.count) for row, token in more if row.count > length]
        return steps

    def _batch(self, rows: list[_Rows]) -> Batch:
        """Books the rows as computed and packs them."""
        begins = [row.seq.num_computed for row in rows]
        chunks = np.array([len(row.input_ids) for row in rows], np.int32)
        for row in rows:
            row.seq.num_computed += len(row.input_ids)
        query_start = np.concatenate([[0], chunks.cumsum()]).astype(np.int32)
        return Batch(
            scheduled=tuple((row.seq.target, len(row.input_ids)) for row in rows),
            input_ids=np.concatenate([np.array(row.input_ids, np.int32) for row in rows]),
            positions=np.concatenate(
                [np.arange(b, b + n, dtype=np.int32) for b, n in zip(begins, chunks, strict=True)]
            ),
            query_start=query_start,
            seq_lens=np.array([row.seq.num_computed for row in rows], np.int32),
            num_decode=int((chunks == 1).sum()),
            tables=self.cache.seats.tables,
            seats=np.array([row.seq.seat for row in rows], np.int32),
            table_changes=self.cache.seats.changes(),
            sample_from=np.array(
                [end - 1 for end, row in zip(query_start[1:], rows, strict=True) if row.count], np.int32
            ),
            sample_rows=tuple(
                SampleRow(_GREEDY, row.seq.target.choice, row.seq.target.tokens, row.seq.target.num_prompt)
                for row in rows
                if row.count
            ),
            copies=(),
        )
