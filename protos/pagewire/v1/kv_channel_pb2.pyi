from pagewire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchRequest(_message.Message):
    __slots__ = ("transfer_id", "prompt_ids", "cache_root", "token_begin", "address", "instance", "expect_instance")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ROOT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    EXPECT_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_root: bytes
    token_begin: int
    address: str
    instance: str
    expect_instance: str
    def __init__(self, transfer_id: _Optional[bytes] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., cache_root: _Optional[bytes] = ..., token_begin: _Optional[int] = ..., address: _Optional[str] = ..., instance: _Optional[str] = ..., expect_instance: _Optional[str] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("transferred_bytes", "lane")
    TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    transferred_bytes: int
    lane: str
    def __init__(self, transferred_bytes: _Optional[int] = ..., lane: _Optional[str] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("hello", "store_put", "offer", "chunk", "sealed", "abort")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STORE_PUT_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    store_put: StorePut
    offer: Offer
    chunk: Chunk
    sealed: Sealed
    abort: Abort
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., store_put: _Optional[_Union[StorePut, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., sealed: _Optional[_Union[Sealed, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("welcome", "store_put", "grant", "chunk_ack", "sealed_ack", "abort")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STORE_PUT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ACK_FIELD_NUMBER: _ClassVar[int]
    SEALED_ACK_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    store_put: StorePut
    grant: Grant
    chunk_ack: ChunkAck
    sealed_ack: SealedAck
    abort: Abort
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., store_put: _Optional[_Union[StorePut, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., chunk_ack: _Optional[_Union[ChunkAck, _Mapping]] = ..., sealed_ack: _Optional[_Union[SealedAck, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "dtype")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "worker_id", "instance", "expect_instance", "fingerprint", "layout", "lanes")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    EXPECT_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    worker_id: str
    instance: str
    expect_instance: str
    fingerprint: bytes
    layout: KvLayout
    lanes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., worker_id: _Optional[str] = ..., instance: _Optional[str] = ..., expect_instance: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., lanes: _Optional[_Iterable[str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("instance", "lane", "epoch")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    instance: str
    lane: str
    epoch: int
    def __init__(self, instance: _Optional[str] = ..., lane: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class StorePut(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("transfer_id", "token_begin", "token_end", "trace")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    token_begin: int
    token_end: int
    trace: _common_pb2.TraceContext
    def __init__(self, transfer_id: _Optional[bytes] = ..., token_begin: _Optional[int] = ..., token_end: _Optional[int] = ..., trace: _Optional[_Union[_common_pb2.TraceContext, _Mapping]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("transfer_id", "window")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    window: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., window: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("transfer_id", "seq", "layer_begin", "layer_end", "token_begin", "token_end", "num_bytes", "checksum", "data")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    seq: int
    layer_begin: int
    layer_end: int
    token_begin: int
    token_end: int
    num_bytes: int
    checksum: int
    data: bytes
    def __init__(self, transfer_id: _Optional[bytes] = ..., seq: _Optional[int] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., token_begin: _Optional[int] = ..., token_end: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class ChunkAck(_message.Message):
    __slots__ = ("transfer_id", "seq", "resend")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RESEND_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    seq: int
    resend: bool
    def __init__(self, transfer_id: _Optional[bytes] = ..., seq: _Optional[int] = ..., resend: _Optional[bool] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("transfer_id", "num_chunks", "root_checksum", "first_tokens")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    ROOT_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    num_chunks: int
    root_checksum: int
    first_tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.SampledToken]
    def __init__(self, transfer_id: _Optional[bytes] = ..., num_chunks: _Optional[int] = ..., root_checksum: _Optional[int] = ..., first_tokens: _Optional[_Iterable[_Union[_common_pb2.SampledToken, _Mapping]]] = ...) -> None: ...

class SealedAck(_message.Message):
    __slots__ = ("transfer_id",)
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    def __init__(self, transfer_id: _Optional[bytes] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("transfer_id", "error")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    error: _common_pb2.Error
    def __init__(self, transfer_id: _Optional[bytes] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...
