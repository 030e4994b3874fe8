"""What clients' outputs must follow, compiled before they are admitted, in processes that may die of it.

A hostile grammar costs its own request a 400, the others at most a place in a short queue, and the event loop nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path

import structlog
from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import Internal, InvalidRequest, Overloaded, PagewireError, from_proto

from pagewire_router.grammar_check import LENGTH
from pagewire_router.request import ValidRequest

log = structlog.get_logger(__name__)

MAX_BYTES = 512 << 10  # of what a client gives
_PROCESSES = 2
_MAX_WAITING = 64
_STARTS = 2
_WALL_S = 30.0  # for a machine that is so busy that a few seconds of CPU time take this long
_KEPT, _KEPT_BYTES = 512, 64 << 20
_TOO_MUCH = "the grammar takes too much time or memory to compile; make it simpler"

Outcome = common_pb2.Constraint | PagewireError


async def constrain(valid: ValidRequest, request: inference_pb2.GenerateRequest, grammars: Grammars) -> None:
    """Sets what the output of a valid request must follow. Raises InvalidRequest, Overloaded."""
    sampling = valid.sampling
    sampling.ClearField("constraint")
    wanted = request.structured_output if request.HasField("structured_output") else None
    reasoning = _thoughts_to_come(request, valid.prompt_tail)
    if wanted is None and (reasoning is None or not reasoning.HasField("max_tokens")):
        return
    if not sampling.eos_token_ids:
        raise InvalidRequest("this model has no end-of-sequence token to end structured output", "structured_outputs")
    sampling.constraint.CopyFrom(await grammars.constraint(wanted, reasoning, request.tenant))
    if wanted is not None:
        sampling.ignore_eos = False  # a complete text has nothing else


def _thoughts_to_come(request: inference_pb2.GenerateRequest, prompt_tail: str) -> inference_pb2.Reasoning | None:
    """`begin` is empty where the prompt has begun them."""
    if not request.HasField("reasoning"):
        return None
    tail, asked = prompt_tail.rstrip(), request.reasoning
    if asked.end and tail.endswith(asked.end):
        return None
    to_come = inference_pb2.Reasoning()
    to_come.CopyFrom(asked)
    if asked.begin and tail.endswith(asked.begin):
        to_come.begin = ""
    return to_come


class Grammars:
    """Starts its processes when they are first needed. `vocab_size` and the ids are the model's."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._command = [
            sys.executable, "-P", "-m", "pagewire_router.grammar_check", str(tokenizer), str(vocab_size),
            *map(str, eos_token_ids),
        ]  # fmt: skip
        self._idle: list[_Checker] = []
        self._free = asyncio.Semaphore(_PROCESSES)
        self._known: OrderedDict[bytes, Outcome] = OrderedDict()
        self._known_bytes = 0
        self._running: dict[bytes, asyncio.Task[Outcome]] = {}

    async def constraint(
        self,
        wanted: inference_pb2.StructuredOutput | None,
        reasoning: inference_pb2.Reasoning | None,
        tenant: str = "",
    ) -> common_pb2.Constraint:
        """For SamplingParams. Raises InvalidRequest, Overloaded.

        What one tenant has had compiled saves another nothing: the time would tell him the other's schemas.
        """
        asked = inference_pb2.GenerateRequest(structured_output=wanted, reasoning=reasoning, tenant=tenant)
        job = asked.SerializeToString(deterministic=True)
        if len(job) > MAX_BYTES:
            raise InvalidRequest(f"a grammar may have {MAX_BYTES >> 10} KiB at most", "structured_outputs")
        outcome = self._known.get(job)
        if outcome is None:
            outcome = await self._compiled(job)
        else:
            self._known.move_to_end(job)
        if isinstance(outcome, PagewireError):
            raise type(outcome)(outcome.message, outcome.param)
        return outcome

    async def close(self) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        for checker in self._idle:
            await checker.end()

    async def _compiled(self, job: bytes) -> Outcome:
        """Equal ones at the same time are compiled once, and to the end, whoever still waits."""
        task = self._running.get(job)
        if task is None:
            if len(self._running) >= _MAX_WAITING:
                raise Overloaded("too many grammars are being compiled; try again", retry_after_s=1.0)
            task = self._running[job] = asyncio.create_task(self._compile(job))
            task.add_done_callback(lambda done: self._forget(job, done))
        return await asyncio.shield(task)

    def _forget(self, job: bytes, done: asyncio.Task[Outcome]) -> None:
        del self._running[job]
        if not done.cancelled():
            done.exception()  # nobody may have waited for it

    async def _compile(self, job: bytes) -> Outcome:
        async with self._checker() as checker:
            outcome = await checker.check(job)
        self._known[job] = outcome
        self._known_bytes += 2 * len(job)
        while len(self._known) > _KEPT or self._known_bytes > _KEPT_BYTES:
            self._known_bytes -= 2 * len(self._known.popitem(last=False)[0])
        return outcome

    @contextlib.asynccontextmanager
    async def _checker(self) -> AsyncIterator[_Checker]:
        """One that nobody else uses; it is kept unless it died."""
        async with self._free:
            checker = self._idle.pop() if self._idle else await _Checker.start(self._command)
            try:
                yield checker
            except BaseException:
                await checker.end()
                raise
            if checker.alive:
                self._idle.append(checker)


class _Checker:
    """One process of grammar_check.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self.alive = True

    @classmethod
    async def start(cls, command: list[str]) -> _Checker:
        """Raises Internal if it does not come up; on a machine that is too busy it may do so only the second time."""
        for _ in range(_STARTS):
            if checker := await cls._started(command):
                return checker
        raise Internal("structured output is not available: its compiler does not start")

    @classmethod
    async def _started(cls, command: list[str]) -> _Checker | None:
        pipe = asyncio.subprocess.PIPE
        checker = cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))
        try:
            async with asyncio.timeout(_WALL_S):
                await checker._stdout.readexactly(1)
        except (asyncio.IncompleteReadError, TimeoutError):
            await checker.end()
            log.warning("a grammar compiler did not start")
            return None
        return checker

    async def check(self, job: bytes) -> Outcome:
        """What the process says; one that says nothing has died of it."""
        try:
            async with asyncio.timeout(_WALL_S):
                self._stdin.write(LENGTH.pack(len(job)) + job)
                await self._stdin.drain()
                (length,) = LENGTH.unpack(await self._stdout.readexactly(LENGTH.size))
                answer = await self._stdout.readexactly(length)
        except TimeoutError:
            await self.end()
            raise Overloaded("compiling the grammar took too long; try again", retry_after_s=1.0) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.end()
            log.warning("a grammar was too much for its compiler", exit_code=self._process.returncode, bytes=len(job))
            return InvalidRequest(_TOO_MUCH, "structured_outputs")
        if answer[:1] == b"E":
            return from_proto(common_pb2.Error.FromString(answer[1:]))
        return common_pb2.Constraint.FromString(answer[1:])

    async def end(self) -> None:
        self.alive = False
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
