"""What a worker takes on: prompts of others, requests to decode, both, or, while it drains, nothing new.

Both services are always there; a role says which of them take new calls. What a worker gives up goes on
there for a while and is then handed over, and its connections to other workers are closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import structlog
from pagewire.v1 import common_pb2
from pagewire_core.errors import Cancelled, InvalidRequest
from pagewire_decode.servicer import DecodeServicer
from pagewire_prefill.servicer import PrefillServicer
from pagewire_transfer.receiver import KvChannelServicer
from pagewire_transfer.sender import KvSender

log = structlog.get_logger(__name__)

_POLL_S = 0.02

NAMES: dict[str, common_pb2.WorkerRole] = {
    "prefill": common_pb2.WORKER_ROLE_PREFILL,
    "decode": common_pb2.WORKER_ROLE_DECODE,
    "both": common_pb2.WORKER_ROLE_BOTH,
}


class Roles:
    """Lives on the event loop. `changed` is told the name of a new role."""

    def __init__(
        self,
        role: str,
        prefill: PrefillServicer,
        decode: DecodeServicer,
        sender: KvSender,
        receiver: KvChannelServicer,
        changed: Callable[[str], None],
    ) -> None:
        self.role = NAMES[role]
        self.draining = False
        self._prefill, self._decode = prefill, decode
        self._sender, self._receiver = sender, receiver
        self._changed = changed
        self._giving_up: asyncio.Task[None] | None = None
        self._apply()
        self._take_one_token()

    async def switch(self, role: common_pb2.WorkerRole, timeout_s: float) -> AsyncIterator[int]:
        """Has the role from now on. How many calls of what it gave up still run, until none does.

        After `timeout_s` they are handed over. Raises InvalidRequest, and Cancelled when another role is set
        meanwhile. The switch goes on when nobody listens.
        """
        if role not in NAMES.values():
            raise InvalidRequest("role must be prefill, decode or both", "role")
        if self.draining:
            raise InvalidRequest("this worker is draining: it takes nothing new in any role")
        self._stop_giving_up()
        log.info("role set", role=_name(role), before=_name(self.role))
        self.role = role
        self._apply()
        self._changed(_name(role))
        refusing = [servicer for servicer in (self._prefill, self._decode) if servicer.refusing]
        giving_up = self._giving_up = asyncio.create_task(self._give_up(refusing, timeout_s))
        while not giving_up.done():
            yield _num_calls(refusing)
            await asyncio.wait([giving_up], timeout=_POLL_S)
        if giving_up.cancelled():
            raise Cancelled("another role was set meanwhile, or the worker was drained")
        giving_up.result()
        yield 0

    async def drain(self, timeout_s: float) -> AsyncIterator[int]:
        """Takes nothing new. How many calls still run, until none does; after `timeout_s` they are handed over.

        That happens also when nobody listens any more; a later drain sets another time.
        """
        self.stop_admitting()
        self._stop_giving_up()
        servicers = (self._prefill, self._decode)
        self._giving_up = asyncio.create_task(self._give_up(servicers, timeout_s))
        while num_calls := _num_calls(servicers):
            yield num_calls
            await asyncio.sleep(_POLL_S)
        yield 0

    def stop_admitting(self) -> None:
        self.draining = True
        self._apply()

    def _apply(self) -> None:
        self._prefill.refusing = self.draining or self.role == common_pb2.WORKER_ROLE_DECODE
        self._decode.refusing = self.draining or self.role == common_pb2.WORKER_ROLE_PREFILL
        self._decode.taking_one_token = False  # not before what it gives up is over: of these there may always be some

    def _take_one_token(self) -> None:
        """A prompt whose answer is one token need not be handed over for it."""
        self._decode.taking_one_token = not self.draining and self.role == common_pb2.WORKER_ROLE_PREFILL

    async def _give_up(self, servicers: Sequence[PrefillServicer | DecodeServicer], timeout_s: float) -> None:
        await _ended(servicers, timeout_s)
        if self._prefill.refusing:
            await self._sender.release()
        if self._decode.refusing:
            await self._receiver.release()
        self._take_one_token()

    def _stop_giving_up(self) -> None:
        """Waits for nothing: another change that came meanwhile would not know of the one that waits."""
        if self._giving_up is not None:
            self._giving_up.cancel()


async def _ended(servicers: Sequence[PrefillServicer | DecodeServicer], timeout_s: float) -> None:
    """Returns when none of their calls runs any more; hands over those that still do after `timeout_s`."""
    clock = asyncio.get_running_loop().time
    hand_over_at = clock() + timeout_s
    while _num_calls(servicers):
        if clock() >= hand_over_at:
            hand_over_at = float("inf")
            for servicer in servicers:
                servicer.hand_over()
        await asyncio.sleep(_POLL_S)


def _num_calls(servicers: Sequence[PrefillServicer | DecodeServicer]) -> int:
    return sum(servicer.num_calls for servicer in servicers)


def _name(role: int) -> str:
    return common_pb2.WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower()  # type: ignore[arg-type]
