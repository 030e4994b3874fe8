"""What a worker does when it is to give up something, whoever listens to how far it is."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
from kv_endpoints import until
from pagewire.v1 import common_pb2
from pagewire_core.errors import Cancelled, InvalidRequest
from pagewire_worker.roles import Roles


@dataclass
class Service:
    """Has a call that ends when it is handed over."""

    num_calls: int = 1
    refusing: bool = False
    taking_one_token: bool = False

    def hand_over(self) -> None:
        self.num_calls = 0


@dataclass
class Connections:
    released: bool = False

    async def release(self) -> None:
        self.released = True


@dataclass
class Scene:
    prefill: Service = field(default_factory=Service)
    decode: Service = field(default_factory=Service)
    sender: Connections = field(default_factory=Connections)
    receiver: Connections = field(default_factory=Connections)
    role: str = "both"
    told: list[str] = field(default_factory=list)  # roles that others are told of

    def __post_init__(self) -> None:
        parts: list[Any] = [self.prefill, self.decode, self.sender, self.receiver]
        self.roles = Roles(self.role, *parts, changed=self.told.append)

    @property
    def takes(self) -> tuple[bool, bool, bool]:
        """Prompts of others; requests to decode; those of one token."""
        return not self.prefill.refusing, not self.decode.refusing, self.decode.taking_one_token


@pytest.mark.parametrize("what", ["drain", "switch"])
async def test_what_is_given_up_is_handed_over_though_nobody_listens_any_more(what: str) -> None:
    """A drain was driven by its call: with an interrupted command the worker took nothing and handed nothing over."""
    s = Scene()
    numbers = s.roles.drain(0.1) if what == "drain" else s.roles.switch(common_pb2.WORKER_ROLE_DECODE, 0.1)
    async with contextlib.aclosing(numbers):
        assert await anext(numbers) > 0
    assert s.prefill.refusing and s.prefill.num_calls
    await until(lambda: not s.prefill.num_calls and s.sender.released, 5)
    if what == "drain":
        await until(lambda: not s.decode.num_calls and s.receiver.released, 5)


async def test_a_drain_that_is_asked_for_again_takes_the_later_time_and_both_hear_of_its_end() -> None:
    s = Scene()

    async def drain(timeout_s: float) -> list[int]:
        return [number async for number in s.roles.drain(timeout_s)]

    first = asyncio.create_task(drain(600))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        assert (await drain(0))[-1] == 0
        assert (await first)[-1] == 0


async def test_of_changes_of_role_that_come_at_once_the_last_one_holds_and_no_other_hands_anything_over() -> None:
    """The first waited for the change before it to end, and then overwrote the second, which went on giving up."""
    s = Scene()

    async def switch(role: common_pb2.WorkerRole, timeout_s: float) -> list[int]:
        return [number async for number in s.roles.switch(role, timeout_s)]

    before = asyncio.create_task(switch(common_pb2.WORKER_ROLE_DECODE, 600))
    await until(lambda: s.prefill.refusing, 5)
    changes = [(common_pb2.WORKER_ROLE_PREFILL, 0), (common_pb2.WORKER_ROLE_BOTH, 600)]
    first, second = [asyncio.create_task(switch(*change)) for change in changes]
    assert await second == [0, 0]
    assert s.roles.role == common_pb2.WORKER_ROLE_BOTH
    for earlier in (before, first):
        with pytest.raises(Cancelled):
            await earlier
    assert s.prefill.num_calls == s.decode.num_calls == 1
    assert not s.prefill.refusing and not s.decode.refusing


@pytest.mark.parametrize(
    ("role", "takes"),
    [("prefill", (True, False, True)), ("decode", (False, True, False)), ("both", (True, True, False))],
)
async def test_a_role_says_what_is_taken_from_the_start_and_a_drain_that_nothing_is(
    role: str, takes: tuple[bool, bool, bool]
) -> None:
    s = Scene(role=role)
    assert s.takes == takes
    assert [number async for number in s.roles.drain(0)][-1] == 0
    await until(lambda: s.receiver.released, 5)
    assert s.takes == (False, False, False)
    with pytest.raises(InvalidRequest, match="draining"):
        await anext(s.roles.switch(common_pb2.WORKER_ROLE_BOTH, 0))


async def test_requests_of_one_token_are_taken_again_once_what_was_given_up_is_over() -> None:
    """Connections of what it goes on with stay."""
    s = Scene()
    numbers = s.roles.switch(common_pb2.WORKER_ROLE_PREFILL, 600)
    assert [await anext(numbers) for _ in range(3)] == [1, 1, 1], "how far it is is told again and again"
    assert s.takes == (True, False, False) and s.told == ["prefill"]
    s.decode.num_calls = 0
    assert [number async for number in numbers] == [0]
    assert s.takes == (True, False, True)
    assert s.receiver.released and not s.sender.released


async def test_what_is_no_role_changes_nothing() -> None:
    s = Scene()
    with pytest.raises(InvalidRequest, match="must be prefill, decode or both"):
        await anext(s.roles.switch(common_pb2.WORKER_ROLE_UNSPECIFIED, 0))
    assert s.takes == (True, True, False) and not s.told


async def test_a_later_drain_may_give_more_time_than_the_one_before() -> None:
    s = Scene()
    async with contextlib.aclosing(s.roles.drain(0.05)) as hurried, contextlib.aclosing(s.roles.drain(600)) as patient:
        assert await anext(hurried) == await anext(patient) == 2
        await asyncio.sleep(0.15)
        assert s.prefill.num_calls == s.decode.num_calls == 1


async def test_a_drain_takes_requests_of_one_token_no_more_from_its_beginning_on() -> None:
    s = Scene(role="prefill")
    async with contextlib.aclosing(s.roles.drain(600)) as numbers:
        assert await anext(numbers) == 2
        assert s.takes == (False, False, False)


async def test_a_worker_that_goes_on_to_decode_keeps_the_connections_it_receives_over() -> None:
    s = Scene()
    assert [number async for number in s.roles.switch(common_pb2.WORKER_ROLE_DECODE, 0)][-1] == 0
    assert s.sender.released and not s.receiver.released


async def test_who_sets_a_role_hears_of_what_could_not_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stumble() -> None:
        raise RuntimeError("a bug")

    s = Scene()
    monkeypatch.setattr(s.sender, "release", stumble)
    with pytest.raises(RuntimeError, match="a bug"):
        async for _ in s.roles.switch(common_pb2.WORKER_ROLE_DECODE, 0):
            pass
