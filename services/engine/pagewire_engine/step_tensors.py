"""A batch as the tensors that DenseModel's ops take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pagewire_engine.batch import Batch


@dataclass(frozen=True)
class Rows:
    """What attention needs of some of a batch's sequences: B sequences, M blocks at most."""

    block_tables: torch.Tensor  # int32 [B, M]
    seq_lens: torch.Tensor  # int32 [B], this step's tokens included
    cu_seqlens_q: torch.Tensor  # int32 [B + 1], first row of each sequence


@dataclass(frozen=True)
class StepTensors:
    """T rows: `num_decode` single ones, then packed chunks."""

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slot_mapping: torch.Tensor  # int64 [T]
    num_decode: int
    decode: Rows | None
    prefill: Rows | None


def step_tensors(batch: Batch, block_size: int, device: torch.device) -> StepTensors:
    """The batch on `device`. Input ids must be known: none negative."""
    n, num_seqs = batch.num_decode, len(batch.seats)
    seat_of_row = np.repeat(batch.seats, np.diff(batch.query_start))
    blocks = batch.tables[seat_of_row, batch.positions // block_size].astype(np.int64)
    return StepTensors(
        input_ids=_tensor(batch.input_ids, device).long(),
        positions=_tensor(batch.positions, device).long(),
        slot_mapping=_tensor(blocks * block_size + batch.positions % block_size, device),
        num_decode=n,
        decode=_rows(batch, 0, n, block_size, device) if n else None,
        prefill=_rows(batch, n, num_seqs, block_size, device) if n < num_seqs else None,
    )


def _rows(batch: Batch, begin: int, end: int, block_size: int, device: torch.device) -> Rows:
    seq_lens = batch.seq_lens[begin:end]
    width = -(-int(seq_lens.max()) // block_size)
    return Rows(
        block_tables=_tensor(batch.tables[batch.seats[begin:end], :width], device),
        seq_lens=_tensor(seq_lens, device),
        cu_seqlens_q=_tensor(batch.query_start[begin : end + 1] - batch.query_start[begin], device),
    )


def _tensor(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
