from pagewire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "transfer_id", "prompt_ids", "cache_root", "sampling", "n", "decode_address", "decode_instance", "decode_local_tokens", "holder", "prompt_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ROOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DECODE_LOCAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: bytes
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_root: bytes
    sampling: _common_pb2.SamplingParams
    n: int
    decode_address: str
    decode_instance: str
    decode_local_tokens: int
    holder: _common_pb2.KvHolder
    prompt_logprobs: int
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[bytes] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., cache_root: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., n: _Optional[int] = ..., decode_address: _Optional[str] = ..., decode_instance: _Optional[str] = ..., decode_local_tokens: _Optional[int] = ..., holder: _Optional[_Union[_common_pb2.KvHolder, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("started", "first_tokens", "kv_sent", "prompt_logprobs")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_SENT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    started: PrefillStarted
    first_tokens: FirstTokens
    kv_sent: KvSent
    prompt_logprobs: _common_pb2.PromptLogprobs
    def __init__(self, started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., first_tokens: _Optional[_Union[FirstTokens, _Mapping]] = ..., kv_sent: _Optional[_Union[KvSent, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("cached_tokens", "fetched")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    fetched: _common_pb2.Fetched
    def __init__(self, cached_tokens: _Optional[int] = ..., fetched: _Optional[_Union[_common_pb2.Fetched, _Mapping]] = ...) -> None: ...

class FirstTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.SampledToken]
    def __init__(self, tokens: _Optional[_Iterable[_Union[_common_pb2.SampledToken, _Mapping]]] = ...) -> None: ...

class KvSent(_message.Message):
    __slots__ = ("transferred_tokens", "transferred_bytes", "lane", "timings", "wire_us", "overlap", "resent_chunks")
    TRANSFERRED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    WIRE_US_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    RESENT_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    transferred_tokens: int
    transferred_bytes: int
    lane: str
    timings: _common_pb2.StageTimings
    wire_us: int
    overlap: float
    resent_chunks: int
    def __init__(self, transferred_tokens: _Optional[int] = ..., transferred_bytes: _Optional[int] = ..., lane: _Optional[str] = ..., timings: _Optional[_Union[_common_pb2.StageTimings, _Mapping]] = ..., wire_us: _Optional[int] = ..., overlap: _Optional[float] = ..., resent_chunks: _Optional[int] = ...) -> None: ...

class EmbedPromptRequest(_message.Message):
    __slots__ = ("request_id", "prompt_ids", "cache_root")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ROOT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_root: bytes
    def __init__(self, request_id: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., cache_root: _Optional[bytes] = ...) -> None: ...

class EmbedPromptResponse(_message.Message):
    __slots__ = ("vector", "cached_tokens")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    vector: _containers.RepeatedScalarFieldContainer[float]
    cached_tokens: int
    def __init__(self, vector: _Optional[_Iterable[float]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...
