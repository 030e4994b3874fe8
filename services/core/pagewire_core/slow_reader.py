"""A client that takes nothing of what it asked for: its call is ended, and with it all that the call holds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TypeVar

import grpc

from pagewire_core.errors import Cancelled, PagewireError
from pagewire_core.rpc import abort_with

T = TypeVar("T")

MAX_UNREAD = 16_384  # messages of one call that may wait for their reader
_ending: set[asyncio.Task[None]] = set()


def too_slow() -> PagewireError:
    """What a client is told whose unread answer has grown too long."""
    return Cancelled("the client reads its answer far more slowly than it is made; it was cancelled")


async def ended_if_unread(
    responses: AsyncGenerator[T, None], context: grpc.aio.ServicerContext, timeout_s: float
) -> AsyncGenerator[T, None]:
    """`responses`, in a method's own task; the call is cancelled when its client takes nothing for `timeout_s`.

    A client that reads again later finds the status CANCELLED after what was on its way.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def give_up() -> None:
        task.cancel()
        ending = asyncio.create_task(_tell(context, timeout_s))
        _ending.add(ending)
        ending.add_done_callback(_ending.discard)

    async with contextlib.aclosing(responses):
        async for response in responses:
            timer = loop.call_later(timeout_s, give_up)
            try:
                yield response
            finally:
                timer.cancel()


async def _tell(context: grpc.aio.ServicerContext, timeout_s: float) -> None:
    """Sends the status, which waits behind what is unread until the client reads or its connection ends."""
    with contextlib.suppress(grpc.aio.BaseError, asyncio.InvalidStateError):
        await abort_with(context, Cancelled(f"the client took nothing of its answer for {timeout_s:g} s"))
