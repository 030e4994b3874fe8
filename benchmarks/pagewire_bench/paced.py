"""The pace of simulated workers, and the moments at which all their streams get a token."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """ttft_s: of a first token, whatever the prompt. itl_s: between a stream's tokens."""

    ttft_s: float
    itl_s: float

    @property
    def flags(self) -> list[str]:
        return [f"--ttft-ms={self.ttft_s * 1e3:g}", f"--itl-ms={self.itl_s * 1e3:g}"]

    @staticmethod
    def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Pace]:
        parser.add_argument("--ttft-ms", type=float, required=True)
        parser.add_argument("--itl-ms", type=float, required=True)
        args = parser.parse_args()
        return args, Pace(args.ttft_ms / 1e3, args.itl_ms / 1e3)


class Ticker:
    """Wakes all who wait at multiples of `period_s`, in one turn of the event loop, as an engine's step does."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next: asyncio.Future[None] | None = None

    async def tick(self) -> None:
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.create_future()
            loop.call_at((loop.time() // self._period_s + 1) * self._period_s, self._wake)
        await asyncio.shield(self._next)

    def _wake(self) -> None:
        assert self._next is not None
        done, self._next = self._next, None
        done.set_result(None)
