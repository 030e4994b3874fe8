"""Scheduled sequences -> the tensors of one step.

Rows of the batch: first one row per decoding sequence, then the chunks of the prefilling ones, packed.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from pagewire_engine.sampler import SampleRow
from pagewire_engine.sequence import Sequence


@dataclass(frozen=True)
class Rows:
    """What attention needs of some of a batch's sequences: B sequences, M blocks at most."""

    block_tables: torch.Tensor  # int32 [B, M], padded with 0
    seq_lens: torch.Tensor  # int32 [B], this step's tokens included
    cu_seqlens_q: torch.Tensor  # int32 [B + 1], first row of each sequence


@dataclass(frozen=True)
class Batch:
    """One step. T rows; `sample_from` and `sample_rows` name the tokens to choose, in step order."""

    scheduled: tuple[tuple[Sequence, int], ...]  # sequences and the tokens each computes
    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slot_mapping: torch.Tensor  # int64 [T]
    num_decode: int
    decode: Rows | None
    prefill: Rows | None
    sample_from: torch.Tensor  # int64 [R], row whose logits give token r
    sample_rows: tuple[SampleRow, ...]
    copies: tuple[tuple[int, int], ...]  # blocks to copy before the step (copy-on-write)


def build_batch(
    scheduled: Seq[tuple[Sequence, int]], block_size: int, copies: Seq[tuple[int, int]], device: torch.device
) -> Batch:
    """`scheduled` in any order; single tokens go first, as decode rows."""
    ordered = sorted(scheduled, key=lambda item: item[1] > 1)
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sample_from: list[int] = []
    sample_rows: list[SampleRow] = []
    for seq, chunk in ordered:
        begin, end = seq.num_computed, seq.num_computed + chunk
        input_ids += seq.tokens[begin:end]
        positions += range(begin, end)
        slots += (seq.block_table[p // block_size] * block_size + p % block_size for p in range(begin, end))
        if end == len(seq.tokens):
            for choice in seq.request.choices_to_sample(seq):
                sample_from.append(len(input_ids) - 1)
                sample_rows.append(SampleRow(seq.request.params, choice, seq.tokens, seq.num_prompt))
    num_decode = sum(1 for _, chunk in ordered if chunk == 1)
    return Batch(
        scheduled=tuple(ordered),
        input_ids=_tensor(input_ids, torch.int64, device),
        positions=_tensor(positions, torch.int64, device),
        slot_mapping=_tensor(slots, torch.int64, device),
        num_decode=num_decode,
        decode=_rows(ordered[:num_decode], device),
        prefill=_rows(ordered[num_decode:], device),
        sample_from=_tensor(sample_from, torch.int64, device),
        sample_rows=tuple(sample_rows),
        copies=tuple(copies),
    )


def _tensor(values: list[int] | list[list[int]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _rows(scheduled: Seq[tuple[Sequence, int]], device: torch.device) -> Rows | None:
    if not scheduled:
        return None
    width = max(len(seq.block_table) for seq, _ in scheduled)
    tables = [seq.block_table + [0] * (width - len(seq.block_table)) for seq, _ in scheduled]
    starts = [0]
    for _, chunk in scheduled:
        starts.append(starts[-1] + chunk)
    return Rows(
        block_tables=_tensor(tables, torch.int32, device),
        seq_lens=_tensor([seq.num_computed + chunk for seq, chunk in scheduled], torch.int32, device),
        cu_seqlens_q=_tensor(starts, torch.int32, device),
    )
