"""One step as plain numbers on the host: what a runner is given, whatever its device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagewire_engine.sampler import SampleRow
from pagewire_engine.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Scored:
    """Rows whose logits tell how likely the prompt's next token was. parts: whose they are, in order: a sequence, the
    place of the first token that is scored, and how many are."""

    rows: np.ndarray  # int32 [S]
    ids: np.ndarray  # int32 [S], the token after each
    num_top: int  # of the best tokens in its place, the most that any of the sequences wants
    parts: tuple[tuple[Sequence, int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """T rows of B sequences; R tokens to choose.

    Order: sequences that decode one token, then those that carry draft tokens, then prefill chunks.
    `tables` is the engine's own and not to be read once `launch` has returned.
    """

    scheduled: tuple[tuple[Sequence, int], ...]  # sequences, and the rows each has in this step
    input_ids: np.ndarray  # int32 [T]; -1 - r: token r of the step before (only for a runner that overlaps)
    positions: np.ndarray  # int32 [T]
    query_start: np.ndarray  # int32 [B + 1], first row of each sequence
    seq_lens: np.ndarray  # int32 [B], tokens of each sequence after this step
    num_decode: int  # the first num_decode sequences have one row each
    tables: np.ndarray  # int32 [seats, max_blocks], C-contiguous; grows (a new array) when more sequences run
    seats: np.ndarray  # int32 [B], row of `tables` of each sequence
    table_changes: tuple[int, ...]  # seats whose row in `tables` changed since the batch before
    sample_from: np.ndarray  # int32 [R], row whose logits give token r; tokens before it: positions[row] + 1
    sample_rows: tuple[SampleRow, ...]
    copies: tuple[tuple[int, int], ...]  # blocks to copy before the step (copy-on-write): source, destination
    # uint32 [R, ceil(vocabulary / 32)]: token v may be chosen if bit v % 32 of word v // 32 is set; None: all may
    allowed: np.ndarray | None = None
    number: int = 0  # of the step, ascending
    layer_group: int = 0  # tell `LayerProgress` after so many layers each; 0: nobody wants to know
    scored: Scored | None = None  # None: nobody wants log probabilities of a prompt
