"""A batch as the arrays that a step on the device reads."""

from __future__ import annotations

import numpy as np

from pagewire_engine.batch import Batch
from pagewire_engine.gpu.transfers import Arrays


def row_arrays(batch: Batch, block_size: int) -> Arrays:
    """For T rows and B sequences: input_ids, positions, slots int32 [T]; seats, seq_lens int32 [B]."""
    seat_of_row = batch.seats
    if batch.num_decode < len(batch.seats):
        seat_of_row = np.repeat(batch.seats, np.diff(batch.query_start))
    blocks = batch.tables[seat_of_row, batch.positions // block_size]
    return {
        "input_ids": batch.input_ids,
        "positions": batch.positions,
        "slots": blocks * np.int32(block_size) + batch.positions % np.int32(block_size),
        "seats": batch.seats,
        "seq_lens": batch.seq_lens,
    }


def chunk_arrays(batch: Batch) -> Arrays:
    """What a step of more than single rows needs besides: chunk_start (see Attention), sample_from int32 [R]."""
    n = batch.num_decode
    return {"chunk_start": batch.query_start[n:] - np.int32(n), "sample_from": batch.sample_from}


def pad_rows(arrays: Arrays, num_rows: int) -> Arrays:
    """`num_rows` rows of each array; those beyond it are padding: no slot to write, no keys, token 0, greedy."""
    padded = {}
    for name, array in arrays.items():
        rows = padded[name] = np.zeros(num_rows, array.dtype)
        rows[: len(array)] = array
    padded["slots"][len(arrays["slots"]) :] = -1
    return padded


def samples_each_row(batch: Batch) -> bool:
    """Whether every sequence has one row and one token to choose: the steps that CUDA graphs are made for."""
    rows = len(batch.seats)
    return batch.num_decode == rows == len(batch.sample_rows) and bool((batch.sample_from == np.arange(rows)).all())
