"""Arrays over a stream socket between the ranks of a worker: a step's batch one way, what came of it the other."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping

import numpy as np

from pagewire_engine.batch import Batch, Scored

_LENGTH = struct.Struct("<I")
_BATCH = ("input_ids", "positions", "query_start", "seq_lens", "sample_from")

Arrays = dict[str, np.ndarray]


def send(link: socket.socket, arrays: Mapping[str, np.ndarray]) -> None:
    """length | JSON: names, types and shapes | the arrays' bytes. Raises OSError if the other side is gone."""
    head = json.dumps([(name, array.dtype.str, array.shape) for name, array in arrays.items()]).encode()
    link.sendall(b"".join([_LENGTH.pack(len(head)), head, *(array.tobytes() for array in arrays.values())]))


def receive(link: socket.socket) -> Arrays:
    """Raises ConnectionError if the other side is gone."""
    [length] = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    arrays: Arrays = {}
    for name, dtype, shape in json.loads(_exactly(link, length)):
        data = _exactly(link, np.dtype(dtype).itemsize * math.prod(shape))
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays


def _exactly(link: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    rest = memoryview(data)
    while rest:
        count = link.recv_into(rest)
        if not count:
            raise ConnectionError("the other rank is gone")
        rest = rest[count:]
    return data


def batch_arrays(batch: Batch, block_size: int) -> Arrays:
    """What a rank needs to compute its part; of the block tables only those of this batch, as far as they go."""
    width = -(-int(batch.seq_lens.max()) // block_size)
    arrays = {name: getattr(batch, name) for name in _BATCH}
    arrays["num_decode"] = np.array(batch.num_decode)
    arrays["tables"] = batch.tables[batch.seats, :width]
    arrays["copies"] = np.array(batch.copies, np.int64).reshape(-1, 2)
    if batch.scored is not None:
        scored = batch.scored
        arrays |= {"score_rows": scored.rows, "score_ids": scored.ids, "score_top": np.array(scored.num_top)}
    return arrays if batch.allowed is None else arrays | {"allowed": batch.allowed}


def to_batch(arrays: Arrays) -> Batch:
    """The batch without its sequences, and without the rows' sampling."""
    seats = np.arange(len(arrays["seq_lens"]), dtype=np.int32)
    return Batch(
        scheduled=(),
        input_ids=arrays["input_ids"],
        positions=arrays["positions"],
        query_start=arrays["query_start"],
        seq_lens=arrays["seq_lens"],
        num_decode=int(arrays["num_decode"]),
        tables=arrays["tables"],
        seats=seats,
        table_changes=tuple(seats.tolist()),
        sample_from=arrays["sample_from"],
        sample_rows=(),
        copies=tuple(map(tuple, arrays["copies"].tolist())),
        allowed=arrays.get("allowed"),
        scored=_scored(arrays) if "score_rows" in arrays else None,
    )


def _scored(arrays: Arrays) -> Scored:
    return Scored(arrays["score_rows"], arrays["score_ids"], int(arrays["score_top"]))
