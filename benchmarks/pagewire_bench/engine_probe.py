"""Times of an engine in this process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from pagewire_engine.engine import Engine
from pagewire_engine.events import Event, Failed, Finished
from pagewire_engine.sampler import Sampled
from pagewire_engine.sampling_params import SamplingParams
from pagewire_engine.sequence import Request

from pagewire_bench.engine_cases import STREAM_ROUNDS, STREAM_TOKENS, WARM_STEPS, Case

_FIRST_ID = 64


class EngineProbe:
    """`vocab_size`: below it are the ids of the random prompts."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size

    def run(self, case: Case) -> list[float]:
        """Milliseconds: of every step of a decode case, else of the whole."""
        if case.kind == "decode":
            return self._decode(case)
        if case.kind == "prefill":
            return [self._timed(lambda: self._complete(1, 1, case.context, 1))]
        num_requests = STREAM_ROUNDS * case.num_seqs
        return [self._timed(lambda: self._complete(case.num_seqs, num_requests, case.context, STREAM_TOKENS))]

    def _decode(self, case: Case) -> list[float]:
        """The sequences' KV is that of one computed prompt, copied to blocks of their own."""
        engine = self._engine
        computed = self._request(case.context, 1, prefill_only=True)
        engine.submit(computed)
        while engine.step():
            pass
        source = engine.block_table(computed)
        for _ in range(case.num_seqs):
            blocks = engine.blocks.allocate(len(source))
            engine.runner.cache.copy_blocks(list(zip(source, blocks, strict=True)))
            request = self._request(case.context, case.max_len - case.context)
            engine.start_transferred(request, blocks, [Sampled(_FIRST_ID)])
        engine.release(computed)
        for _ in range(WARM_STEPS):
            engine.step()
        times = [self._timed(engine.step) for _ in range(case.steps)]
        while engine.load()["num_running"]:  # where steps overlap, the last is still to be seen
            engine.step()
        return times

    def _complete(self, in_flight: int, num_requests: int, num_tokens: int, max_tokens: int) -> None:
        """A closed loop: the next prompt comes when one of `in_flight` requests has ended."""
        waiting = [self._request(num_tokens, max_tokens) for _ in range(num_requests)]
        left = num_requests

        def on_event(event: Event) -> None:
            nonlocal left
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                left -= 1
                if waiting:
                    self._engine.submit(waiting.pop())

        for request in waiting:
            request.emit = on_event
        for _ in range(in_flight):
            self._engine.submit(waiting.pop())
        while left:
            self._engine.step()

    def _request(self, num_tokens: int, max_tokens: int, *, prefill_only: bool = False) -> Request:
        prompt = [random.randrange(_FIRST_ID, self._vocab_size) for _ in range(num_tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return Request("benchmark", prompt, bytes(32), params, 1, lambda event: None, prefill_only)

    def _timed(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
