"""What a failed transfer is called where it ends a request's leg."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pagewire_core.errors import Cancelled, Overloaded, PagewireError, TransferLost


@contextlib.contextmanager
def transferring() -> Iterator[None]:
    """Raises TransferLost for whatever ended the transfer, but for want of room and for being told to end."""
    try:
        yield
    except (Cancelled, Overloaded, TransferLost):
        raise
    except PagewireError as error:
        raise TransferLost(error.message) from error
