"""What a step has to say, until it is said."""

from __future__ import annotations

from pagewire_engine.events import Event
from pagewire_engine.sequence import Request

Outbox = list[tuple[Request, Event]]


def deliver_outbox(outbox: Outbox) -> None:
    """Emits each event, unless its request was cancelled meanwhile."""
    for request, event in outbox:
        if not request.cancelled:
            request.emit(event)
