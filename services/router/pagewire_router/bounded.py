"""Work on what clients send, in processes that may die of it (bounded_process.py is their end).

A hostile job costs its own request an error, the others at most a place in a short queue, and the event loop nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence

import structlog
from pagewire_core.errors import Internal, Overloaded

from pagewire_router.bounded_process import LENGTH

log = structlog.get_logger(__name__)

_PROCESSES = 2
_STARTS = 2
_MAX_WAITING = 64
_WALL_S = 30.0  # for a machine that is so busy that a few seconds of CPU time take this long
_INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")  # neither passwords nor keys


class BoundedProcesses:
    """Starts its processes when they are first needed. module: what they run. task: what they do, in words."""

    def __init__(self, module: str, arguments: Sequence[str], task: str) -> None:
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        self._task = task
        self._idle: list[_Process] = []
        self._free = asyncio.Semaphore(_PROCESSES)
        self._num_waiting = 0

    async def ask(self, job: bytes) -> bytes | None:
        """The answer; None: the process died of it. Raises Internal if none starts, and Overloaded."""
        if self._num_waiting >= _MAX_WAITING:
            raise Overloaded(f"too many requests wait for {self._task}; try again", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            async with self._process() as process, asyncio.timeout(_WALL_S):
                answer = await process.ask(job)
        except TimeoutError:
            raise Overloaded(f"{self._task} took too long; try again", retry_after_s=1.0) from None
        finally:
            self._num_waiting -= 1
        if answer is None:
            log.warning(f"{self._task} was too much for its process", exit_code=process.exit_code, bytes=len(job))
        return answer

    async def close(self) -> None:
        for process in self._idle:
            await process.end()

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[_Process]:
        """One that nobody else uses; it is kept unless it died."""
        async with self._free:
            process = self._idle.pop() if self._idle else await self._start()
            try:
                yield process
            except BaseException:
                await process.end()
                raise
            if process.alive:
                self._idle.append(process)

    async def _start(self) -> _Process:
        """On a machine that is too busy it may come up only the second time."""
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        for _ in range(_STARTS):
            if process := await _Process.start(self._command, environment):
                return process
            log.warning(f"a process for {self._task} did not start")
        raise Internal(f"{self._task} is not possible: its process does not start")


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self.alive = True

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> _Process | None:
        """None if it does not come up. Who stops waiting ends it: nobody would know of it."""
        pipe = asyncio.subprocess.PIPE
        made = cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=environment))
        try:
            async with asyncio.timeout(_WALL_S):
                await made._stdout.readexactly(1)
        except BaseException as error:
            await made.end()
            if isinstance(error, (asyncio.IncompleteReadError, TimeoutError)):
                return None
            raise
        return made

    async def ask(self, job: bytes) -> bytes | None:
        """What the process says; None: it says nothing, as it has died."""
        try:
            self._stdin.write(LENGTH.pack(len(job)) + job)
            await self._stdin.drain()
            (length,) = LENGTH.unpack(await self._stdout.readexactly(LENGTH.size))
            return await self._stdout.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self.end()
            return None

    async def end(self) -> None:
        self.alive = False
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
