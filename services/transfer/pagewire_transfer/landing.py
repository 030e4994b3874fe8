"""What the receiving pairs of a worker share, and a chunk on its way into pages."""

from __future__ import annotations

from dataclasses import dataclass

from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Cancelled

from pagewire_transfer.identity import WorkerIdentity
from pagewire_transfer.incoming import Incoming
from pagewire_transfer.metrics import StagingSlots, TransferMetrics
from pagewire_transfer.sink import KvSink
from pagewire_transfer.wire import ChunkRange


@dataclass(frozen=True)
class ReceiveSettings:
    """What all pairs of one servicer share."""

    identity: WorkerIdentity
    sink: KvSink
    lanes: list[str]
    metrics: TransferMetrics
    staging: StagingSlots
    timeout_s: float
    window: int


@dataclass
class Landing:
    """A chunk between its announcement and its acknowledgement; without a part it is dropped on arrival."""

    chunk: kv.Chunk
    incoming: Incoming | None = None
    part: ChunkRange | None = None
    refused: Cancelled | None = None
