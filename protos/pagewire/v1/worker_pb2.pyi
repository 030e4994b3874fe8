from pagewire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("worker_id", "instance", "role", "address", "fingerprint", "model_digest", "protocol", "max_model_len", "block_size", "total_blocks", "kv_bytes_per_token", "lanes", "startup", "flags", "constraints", "one_token", "sampling_revision")
    class FlagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    STARTUP_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINTS_FIELD_NUMBER: _ClassVar[int]
    ONE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_REVISION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    instance: str
    role: _common_pb2.WorkerRole
    address: str
    fingerprint: bytes
    model_digest: bytes
    protocol: int
    max_model_len: int
    block_size: int
    total_blocks: int
    kv_bytes_per_token: int
    lanes: _containers.RepeatedScalarFieldContainer[str]
    startup: _containers.RepeatedCompositeFieldContainer[StartupPhase]
    flags: _containers.ScalarMap[str, str]
    constraints: bool
    one_token: bool
    sampling_revision: int
    def __init__(self, worker_id: _Optional[str] = ..., instance: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., address: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., model_digest: _Optional[bytes] = ..., protocol: _Optional[int] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., total_blocks: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., lanes: _Optional[_Iterable[str]] = ..., startup: _Optional[_Iterable[_Union[StartupPhase, _Mapping]]] = ..., flags: _Optional[_Mapping[str, str]] = ..., constraints: _Optional[bool] = ..., one_token: _Optional[bool] = ..., sampling_revision: _Optional[int] = ...) -> None: ...

class StartupPhase(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("free_blocks", "total_blocks", "reserved_blocks", "num_running", "num_waiting", "waiting_prefill_tokens", "running_kv_tokens", "open_transfers", "step_cost", "staging_slots", "max_num_seqs", "draining", "waiting_transfers", "waiting_prefill_attended", "cached_blocks", "role", "block_events")
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OPEN_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_FIELD_NUMBER: _ClassVar[int]
    STAGING_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_ATTENDED_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_FIELD_NUMBER: _ClassVar[int]
    free_blocks: int
    total_blocks: int
    reserved_blocks: int
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    running_kv_tokens: int
    open_transfers: int
    step_cost: StepCost
    staging_slots: int
    max_num_seqs: int
    draining: bool
    waiting_transfers: int
    waiting_prefill_attended: float
    cached_blocks: int
    role: _common_pb2.WorkerRole
    block_events: int
    def __init__(self, free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., reserved_blocks: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., running_kv_tokens: _Optional[int] = ..., open_transfers: _Optional[int] = ..., step_cost: _Optional[_Union[StepCost, _Mapping]] = ..., staging_slots: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., draining: _Optional[bool] = ..., waiting_transfers: _Optional[int] = ..., waiting_prefill_attended: _Optional[float] = ..., cached_blocks: _Optional[int] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., block_events: _Optional[int] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("prefill_base_ms", "prefill_ms_per_token", "decode_base_ms", "decode_ms_per_sequence", "prefill_ms_per_attended", "decode_ms_per_kv_token")
    PREFILL_BASE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DECODE_BASE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_PER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_PER_ATTENDED_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_PER_KV_TOKEN_FIELD_NUMBER: _ClassVar[int]
    prefill_base_ms: float
    prefill_ms_per_token: float
    decode_base_ms: float
    decode_ms_per_sequence: float
    prefill_ms_per_attended: float
    decode_ms_per_kv_token: float
    def __init__(self, prefill_base_ms: _Optional[float] = ..., prefill_ms_per_token: _Optional[float] = ..., decode_base_ms: _Optional[float] = ..., decode_ms_per_sequence: _Optional[float] = ..., prefill_ms_per_attended: _Optional[float] = ..., decode_ms_per_kv_token: _Optional[float] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotResponse(_message.Message):
    __slots__ = ("hashes", "sequence")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    sequence: int
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., sequence: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_running",)
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    def __init__(self, num_running: _Optional[int] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("role", "timeout_s")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.WorkerRole
    timeout_s: float
    def __init__(self, role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("num_running",)
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    def __init__(self, num_running: _Optional[int] = ...) -> None: ...

class WorkerServiceMetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerServiceMetricsResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ResetPrefixCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResetPrefixCacheResponse(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...
