"""Who a worker is to its peers, and whether a peer's KV may be mixed with ours."""

from __future__ import annotations

from dataclasses import dataclass

from pagewire.v1 import kv_channel_pb2 as kv
from pagewire_core.errors import Incompatible
from pagewire_core.rpc import PROTOCOL, speaks

from pagewire_transfer.lanes import joins, offered


@dataclass(frozen=True)
class WorkerIdentity:
    """One life of a worker process.

    instance: new for every process. fingerprint: 32 bytes, what the KV is of (block_hash.fingerprint).
    host: an address of this machine that peers can reach; lanes listen on it. gpu: the one it computes on, if any.
    """

    worker_id: str
    instance: str
    fingerprint: bytes
    layout: kv.KvLayout
    host: str
    gpu: str = ""

    def hello(self, expect_instance: str, lanes: list[str]) -> kv.Hello:
        """How this worker introduces itself to the decode worker it expects."""
        return kv.Hello(
            protocol=PROTOCOL,
            worker_id=self.worker_id,
            instance=self.instance,
            expect_instance=expect_instance,
            fingerprint=self.fingerprint,
            layout=self.layout,
            lanes=self._offered(lanes),
        )

    def check(self, hello: kv.Hello) -> None:
        """Raises Incompatible with the first field in which the peer differs, and both values."""
        fields: list[tuple[str, object, object]] = [
            ("instance", hello.expect_instance, self.instance),
            ("fingerprint", hello.fingerprint.hex(), self.fingerprint.hex()),
            ("KV layout", describe(hello.layout), describe(self.layout)),
        ]
        if not speaks(hello.protocol):
            fields.insert(0, ("protocol", hello.protocol, PROTOCOL))
        for name, theirs, ours in fields:
            if theirs != ours:
                raise Incompatible(
                    f"prefill worker {hello.worker_id!r} asks for {name} {theirs}, "
                    f"but decode worker {self.worker_id!r} has {name} {ours}"
                )

    def choose_lane(self, hello: kv.Hello, lanes: list[str]) -> str:
        """The first of the peer's lanes that we have; raises Incompatible when there is none."""
        ours = self._offered(lanes)
        for theirs in hello.lanes:
            for lane, name in zip(lanes, ours, strict=True):
                if joins(theirs, name):
                    return lane
        raise Incompatible(
            f"prefill worker {hello.worker_id!r} has the lanes {','.join(hello.lanes) or 'none'}, "
            f"but decode worker {self.worker_id!r} has {','.join(ours)}; shm is for workers on one host, "
            "nccl for workers on different GPUs"
        )

    def _offered(self, lanes: list[str]) -> list[str]:
        return [offered(lane, self.gpu) for lane in lanes]


def describe(layout: kv.KvLayout) -> str:
    """'12 layers x 4 heads x 64 float32'."""
    return f"{layout.num_layers} layers x {layout.num_kv_heads} heads x {layout.head_dim} {layout.dtype}"
