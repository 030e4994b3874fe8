"""What can go wrong for a client, and the one table that maps it to gRPC and HTTP.

PagewireError            has an ErrorCode, a sentence, perhaps the field at fault
+-- InvalidRequest       the client can mend it: bad value, wrong type
|   +-- ContextLength    prompt and max_tokens do not fit the model
+-- ModelNotFound        no such model is served
+-- Overloaded           the queue is full: try again after `retry_after_s`
+-- Unavailable          nothing can serve this now: no worker, peer lost
|   +-- TransferLost     KV did not cross between two workers, who may both be well
+-- DeadlineExceeded     out of time
+-- Cancelled            the client has gone
+-- Incompatible         a peer speaks another protocol, model or KV layout
+-- Internal             our fault

StartupError             a process cannot start; its sentence is all the user sees (exit code 1)
"""

from __future__ import annotations

import contextlib
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from pagewire.v1 import common_pb2 as pb

ERROR_METADATA_KEY = "pagewire-error-bin"


class StartupError(Exception):
    """A process cannot start. The message is one sentence that names the remedy."""


class PagewireError(Exception):
    """Base of every error a client may see."""

    code: ClassVar[pb.ErrorCode] = pb.ERROR_CODE_INTERNAL

    def __init__(self, message: str, param: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def to_proto(self) -> pb.Error:
        return pb.Error(code=self.code, message=self.message, param=self.param, retry_after_s=self.retry_after_s)


class InvalidRequest(PagewireError):
    code = pb.ERROR_CODE_INVALID_REQUEST


class ContextLength(InvalidRequest):
    code = pb.ERROR_CODE_CONTEXT_LENGTH


class ModelNotFound(PagewireError):
    code = pb.ERROR_CODE_MODEL_NOT_FOUND


class Overloaded(PagewireError):
    code = pb.ERROR_CODE_OVERLOADED


class Unavailable(PagewireError):
    code = pb.ERROR_CODE_UNAVAILABLE


class TransferLost(Unavailable):
    def to_proto(self) -> pb.Error:
        error = super().to_proto()
        error.transfer_lost = True
        return error


class DeadlineExceeded(PagewireError):
    code = pb.ERROR_CODE_DEADLINE


class Cancelled(PagewireError):
    code = pb.ERROR_CODE_CANCELLED


class Incompatible(PagewireError):
    code = pb.ERROR_CODE_INCOMPATIBLE


class Internal(PagewireError):
    code = pb.ERROR_CODE_INTERNAL


_CLASSES: dict[int, type[PagewireError]] = {
    c.code: c
    for c in (
        InvalidRequest, ContextLength, ModelNotFound, Overloaded, Unavailable,
        DeadlineExceeded, Cancelled, Incompatible, Internal,
    )
}  # fmt: skip

# ErrorCode -> (gRPC status, HTTP status).
STATUS: dict[int, tuple[grpc.StatusCode, int]] = {
    pb.ERROR_CODE_INVALID_REQUEST: (grpc.StatusCode.INVALID_ARGUMENT, 400),
    pb.ERROR_CODE_CONTEXT_LENGTH: (grpc.StatusCode.INVALID_ARGUMENT, 400),
    pb.ERROR_CODE_MODEL_NOT_FOUND: (grpc.StatusCode.NOT_FOUND, 404),
    pb.ERROR_CODE_OVERLOADED: (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    pb.ERROR_CODE_UNAVAILABLE: (grpc.StatusCode.UNAVAILABLE, 503),
    pb.ERROR_CODE_DEADLINE: (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    pb.ERROR_CODE_CANCELLED: (grpc.StatusCode.CANCELLED, 499),
    pb.ERROR_CODE_INCOMPATIBLE: (grpc.StatusCode.FAILED_PRECONDITION, 500),
    pb.ERROR_CODE_INTERNAL: (grpc.StatusCode.INTERNAL, 500),
}

# A status that came without an Error attached: the peer is gone or is not ours.
_FROM_STATUS: dict[grpc.StatusCode, type[PagewireError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.FAILED_PRECONDITION: Incompatible,
    grpc.StatusCode.PERMISSION_DENIED: Incompatible,
}


def from_proto(error: pb.Error) -> PagewireError:
    """The exception that `error` describes."""
    kind = TransferLost if error.transfer_lost else _CLASSES.get(error.code, Internal)
    return kind(error.message, error.param, error.retry_after_s)


def from_rpc(error: grpc.RpcError) -> PagewireError:
    """The exception behind a failed call: the attached Error, or what the bare status says."""
    trailing = error.trailing_metadata() or ()  # type: ignore[attr-defined]
    for key, value in trailing:
        if key == ERROR_METADATA_KEY:
            with contextlib.suppress(DecodeError):  # whoever answered is not ours
                return from_proto(pb.Error.FromString(value))
    status, details = error.code(), error.details()  # type: ignore[attr-defined]
    return _FROM_STATUS.get(status, Internal)(details or status.name)
