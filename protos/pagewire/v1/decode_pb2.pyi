from pagewire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReserveRequest(_message.Message):
    __slots__ = ("transfer_id", "prompt_ids", "cache_root", "n")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ROOT_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_root: bytes
    n: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., cache_root: _Optional[bytes] = ..., n: _Optional[int] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("local_tokens", "instance", "kv_address")
    LOCAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KV_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    local_tokens: int
    instance: str
    kv_address: str
    def __init__(self, local_tokens: _Optional[int] = ..., instance: _Optional[str] = ..., kv_address: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "transfer_id", "prompt_ids", "cache_root", "sampling", "n", "local_prefill", "feed_id", "feed_call", "prior", "holder", "prompt_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_ROOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    FEED_ID_FIELD_NUMBER: _ClassVar[int]
    FEED_CALL_FIELD_NUMBER: _ClassVar[int]
    PRIOR_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: bytes
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_root: bytes
    sampling: _common_pb2.SamplingParams
    n: int
    local_prefill: bool
    feed_id: bytes
    feed_call: int
    prior: _containers.RepeatedCompositeFieldContainer[PriorOutput]
    holder: _common_pb2.KvHolder
    prompt_logprobs: int
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[bytes] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., cache_root: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., n: _Optional[int] = ..., local_prefill: _Optional[bool] = ..., feed_id: _Optional[bytes] = ..., feed_call: _Optional[int] = ..., prior: _Optional[_Iterable[_Union[PriorOutput, _Mapping]]] = ..., holder: _Optional[_Union[_common_pb2.KvHolder, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class PriorOutput(_message.Message):
    __slots__ = ("token_ids", "ended")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ended: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., ended: _Optional[bool] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("started", "tokens", "finished", "prompt_logprobs")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    started: DecodeStarted
    tokens: DecodeTokens
    finished: DecodeFinished
    prompt_logprobs: _common_pb2.PromptLogprobs
    def __init__(self, started: _Optional[_Union[DecodeStarted, _Mapping]] = ..., tokens: _Optional[_Union[DecodeTokens, _Mapping]] = ..., finished: _Optional[_Union[DecodeFinished, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class DecodeStarted(_message.Message):
    __slots__ = ("first_tokens", "cached_tokens", "received_tokens", "computed_tokens", "received_bytes", "lane", "resumed", "fetched")
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    first_tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.SampledToken]
    cached_tokens: int
    received_tokens: int
    computed_tokens: int
    received_bytes: int
    lane: str
    resumed: bool
    fetched: _common_pb2.Fetched
    def __init__(self, first_tokens: _Optional[_Iterable[_Union[_common_pb2.SampledToken, _Mapping]]] = ..., cached_tokens: _Optional[int] = ..., received_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., received_bytes: _Optional[int] = ..., lane: _Optional[str] = ..., resumed: _Optional[bool] = ..., fetched: _Optional[_Union[_common_pb2.Fetched, _Mapping]] = ...) -> None: ...

class DecodeTokens(_message.Message):
    __slots__ = ("choices",)
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedCompositeFieldContainer[_common_pb2.ChoiceTokens]
    def __init__(self, choices: _Optional[_Iterable[_Union[_common_pb2.ChoiceTokens, _Mapping]]] = ...) -> None: ...

class DecodeFinished(_message.Message):
    __slots__ = ("timings", "num_preemptions", "feed_entries")
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    FEED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    timings: _common_pb2.StageTimings
    num_preemptions: int
    feed_entries: int
    def __init__(self, timings: _Optional[_Union[_common_pb2.StageTimings, _Mapping]] = ..., num_preemptions: _Optional[int] = ..., feed_entries: _Optional[int] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("transfer_id", "choices")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    choices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, transfer_id: _Optional[bytes] = ..., choices: _Optional[_Iterable[int]] = ...) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class FeedRequest(_message.Message):
    __slots__ = ("feed_id",)
    FEED_ID_FIELD_NUMBER: _ClassVar[int]
    feed_id: bytes
    def __init__(self, feed_id: _Optional[bytes] = ...) -> None: ...

class FeedResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[FeedEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[FeedEntry, _Mapping]]] = ...) -> None: ...

class FeedEntry(_message.Message):
    __slots__ = ("call", "choices")
    CALL_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    call: int
    choices: _containers.RepeatedCompositeFieldContainer[_common_pb2.ChoiceTokens]
    def __init__(self, call: _Optional[int] = ..., choices: _Optional[_Iterable[_Union[_common_pb2.ChoiceTokens, _Mapping]]] = ...) -> None: ...
