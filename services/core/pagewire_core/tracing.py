"""Traces of requests, as OpenTelemetry has them: spans from the bridge to the decode worker, in one tree.

Off unless an endpoint is given (`--otlp-traces-endpoint`), and the SDK is imported only then. A service that has it off
still hands on where its caller is in a trace (W3C `traceparent` and `tracestate`), so that no trace breaks there.
Whether a trace is recorded is decided where it begins.

A span says what was done, where, for how long and how much. It never has a prompt, an answer, or a sentence that may
quote one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, Protocol, Self

import structlog

from pagewire_core.errors import Cancelled, InvalidRequest, ModelNotFound, PagewireError

if TYPE_CHECKING:
    from opentelemetry.trace import Span as Recorded

Attributes = Mapping[str, str | int | float | bool]
Headers = Sequence[tuple[str, str]]
Kind = Literal["internal", "server", "client"]

PARENT_KEY, STATE_KEY = "traceparent", "tracestate"
_PARENT = re.compile(
    r"(?!ff|00-.{53})[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{1,200})?"
)
_STATE = re.compile(r"[!-~][ -~]{0,511}")
# What the caller did wrong, or gave up, is no error of the span. The sentence may quote what the caller sent.
_CALLERS = (InvalidRequest, ModelNotFound, Cancelled, asyncio.CancelledError, GeneratorExit)


class Recorder(Protocol):
    """Makes spans that are exported; see trace_export."""

    def start(
        self, name: str, kind: Kind, parent: Span, attributes: Attributes | None, started: float | None
    ) -> Span: ...

    def wall_ns(self, monotonic: float | None) -> int: ...

    def close(self) -> None: ...


class Span:
    """A piece of work; where tracing is off, no more than the caller's place in its trace.

    A context manager that ends it, with the error that its body has raised. Times are of the monotonic clock, in
    seconds; None: now. Nothing happens to a span that has ended.
    """

    __slots__ = ("_said", "recorded")

    def __init__(self, said: Headers = (), recorded: Recorded | None = None) -> None:
        """said: by the caller, where nothing is recorded."""
        self._said = said
        self.recorded = recorded

    @property
    def headers(self) -> Headers:
        """For the calls that are part of the work."""
        if self.recorded is None:
            return self._said
        at = self.recorded.get_span_context()
        if not at.is_valid:
            return ()
        parent = (PARENT_KEY, f"00-{at.trace_id:032x}-{at.span_id:016x}-{at.trace_flags:02x}")
        return (parent, (STATE_KEY, at.trace_state.to_header())) if at.trace_state else (parent,)

    @property
    def recording(self) -> bool:
        """Whether it is worth saying anything to it."""
        return self.recorded is not None and self.recorded.is_recording()

    def child(
        self, name: str, attributes: Attributes | None = None, kind: Kind = "internal", started: float | None = None
    ) -> Span:
        return self if _recorder is None else _recorder.start(name, kind, self, attributes, started)

    def set(self, attributes: Attributes) -> None:
        if self.recorded is not None and self.recording:
            self.recorded.set_attributes(attributes)

    def rename(self, name: str) -> None:
        if self.recorded is not None and self.recording:
            self.recorded.update_name(name)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        if self.recorded is not None and self.recording and _recorder is not None:
            self.recorded.add_event(name, attributes, _recorder.wall_ns(None))

    def fail(self, error: BaseException | str) -> None:
        """The work has failed; a string is the kind of error."""
        if self.recorded is None or not self.recording:
            return
        self.recorded.set_attribute("error.type", error if isinstance(error, str) else type(error).__name__)
        if not isinstance(error, _CALLERS):
            from opentelemetry.trace import StatusCode

            self.recorded.set_status(StatusCode.ERROR, error.message if isinstance(error, PagewireError) else None)

    def end(self, at: float | None = None) -> None:
        if self.recorded is not None and self.recording and _recorder is not None:
            self.recorded.end(_recorder.wall_ns(at))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            self.fail(error)
        self.end()


_recorder: Recorder | None = None
NOWHERE = Span()
_current: ContextVar[Span] = ContextVar("span", default=NOWHERE)


def configure(service: str, endpoint: str | None, name: str | None = None, instance: str | None = None) -> None:
    """Begins to export spans to the collector at `endpoint`, if there is one. Raises StartupError.

    name: of the service in its spans; None: pagewire-{service}. instance: which of them this process is; None: its host
    and process id.
    """
    global _recorder
    if endpoint:
        from pagewire_core.trace_export import OtlpRecorder  # a tenth of a second that others need not take

        _recorder = OtlpRecorder(service, endpoint, name, instance)


def close() -> None:
    """Exports what is left, as far as the collector takes it in two seconds, and turns tracing off."""
    global _recorder
    if _recorder is not None:
        _recorder.close()
    _recorder = None


def current() -> Span:
    """What this task works on."""
    return _current.get()


def enter(span: Span) -> None:
    """Makes it what this task works on, to its end; its log lines then have the trace's id."""
    _current.set(span)
    if _recorder is not None and span.headers:
        structlog.contextvars.bind_contextvars(trace_id=span.headers[0][1].split("-")[1])


def begin(name: str, attributes: Attributes | None = None) -> Span:
    """A service's part of what it was called for, entered. The caller ends it."""
    span = current().child(name, attributes, "server")
    enter(span)
    return span


def received(headers: Iterable[tuple[str, str | bytes]]) -> Span:
    """Where a caller is in its trace, as the headers of its call have it; what is not valid counts as not said."""
    parent, states = "", list[str]()
    for key, value in headers:
        if key == PARENT_KEY:
            parent = str(value).strip()
        elif key == STATE_KEY:
            states.append(str(value).strip())
    if not _PARENT.fullmatch(parent):
        return NOWHERE
    state = ",".join(states)
    return Span(((PARENT_KEY, parent), (STATE_KEY, state)) if _STATE.fullmatch(state) else ((PARENT_KEY, parent),))
