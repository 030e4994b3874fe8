"""What clients' outputs must follow, compiled before they are admitted, in processes that may die of it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest, PagewireError, from_proto

from pagewire_router.bounded import BoundedProcesses
from pagewire_router.request import ValidRequest

MAX_BYTES = 512 << 10  # of what a client gives
_KEPT, _KEPT_BYTES = 512, 64 << 20
_TOO_MUCH = "the grammar takes too much time or memory to compile; make it simpler"

Outcome = common_pb2.Constraint | PagewireError


async def constrain(
    valid: ValidRequest, request: inference_pb2.GenerateRequest, grammars: Grammars, ends: Iterable[int] = ()
) -> None:
    """Sets what the output of a valid request must follow. ends: what workers' masks let follow a complete text.

    Raises InvalidRequest, Overloaded.
    """
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
        sampling.eos_token_ids.extend(i for i in ends if i not in sampling.eos_token_ids)


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
    """`vocab_size` and the ids are the model's."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        arguments = (str(tokenizer), str(vocab_size), *map(str, eos_token_ids))
        self._processes = BoundedProcesses("pagewire_router.grammar_check", arguments, "compiling a grammar")
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
        await self._processes.close()

    async def _compiled(self, job: bytes) -> Outcome:
        """Equal ones at the same time are compiled once, and to the end, whoever still waits."""
        task = self._running.get(job)
        if task is None:
            task = self._running[job] = asyncio.create_task(self._compile(job))
            task.add_done_callback(lambda done: self._forget(job, done))
        return await asyncio.shield(task)

    def _forget(self, job: bytes, done: asyncio.Task[Outcome]) -> None:
        del self._running[job]
        if not done.cancelled():
            done.exception()  # nobody may have waited for it

    async def _compile(self, job: bytes) -> Outcome:
        outcome = _outcome(await self._processes.ask(job))
        self._known[job] = outcome
        self._known_bytes += 2 * len(job)
        while len(self._known) > _KEPT or self._known_bytes > _KEPT_BYTES:
            self._known_bytes -= 2 * len(self._known.popitem(last=False)[0])
        return outcome


def _outcome(answer: bytes | None) -> Outcome:
    if answer is None:
        return InvalidRequest(_TOO_MUCH, "structured_outputs")
    if answer[:1] == b"E":
        return from_proto(common_pb2.Error.FromString(answer[1:]))
    return common_pb2.Constraint.FromString(answer[1:])
