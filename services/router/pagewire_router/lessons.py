"""What an attempt teaches the placement of the next ones: which legs work, how fast links are, how long outputs."""

from __future__ import annotations

from pagewire.v1 import common_pb2, decode_pb2, prefill_pb2
from pagewire_core.errors import TransferLost

from pagewire_router.attempt import Event, LegFailed
from pagewire_router.placement import Placed, Placement
from pagewire_router.request import ValidRequest
from pagewire_router.workers import Worker


def learn(placement: Placement[Worker], placed: Placed[Worker], event: Event) -> None:
    if isinstance(event, decode_pb2.FeedEntry):
        return
    if event.WhichOneof("event") == "started" and event.started.HasField("fetched"):
        _learn_fetch(placement, placed, event.started.fetched)
    kind, breakers, decode = event.WhichOneof("event"), placement.breakers, placed.decode.worker_id
    if placed.prefill is None:
        return
    prefill = placed.prefill.worker_id
    if kind == "first_tokens":
        breakers.succeeded("prefill", prefill)
    elif isinstance(event, decode_pb2.DecodeResponse) and kind == "started":
        breakers.succeeded("transfer", prefill, decode)
    elif isinstance(event, prefill_pb2.PrefillResponse) and kind == "kv_sent":
        sent = event.kv_sent
        busy_us = sent.wire_us or sent.timings.transfer_us
        _learn_link(placement, placed.prefill, placed.decode, sent.transferred_bytes, busy_us)


def _learn_fetch(placement: Placement[Worker], placed: Placed[Worker], fetched: common_pb2.Fetched) -> None:
    if placed.holder is not None and fetched.tokens:
        computing = placed.prefill or placed.decode
        _learn_link(placement, placed.holder, computing, fetched.bytes, fetched.fetch_us)


def _learn_link(placement: Placement[Worker], sender: Worker, receiver: Worker, num_bytes: int, busy_us: int) -> None:
    """Of workers that have left nothing is kept."""
    if placement.has(sender) and placement.has(receiver):
        placement.links.observe(sender.worker_id, receiver.worker_id, num_bytes, busy_us / 1e6)


def learn_end(placement: Placement[Worker], placed: Placed[Worker], request: ValidRequest, output_tokens: int) -> None:
    """The attempt gave all that was wanted; output_tokens: over all choices."""
    placement.breakers.succeeded("decode", placed.decode.worker_id)
    if not (request.is_step or request.prompt_only):
        placement.observe_output(output_tokens / request.n)


def learn_failure(
    placement: Placement[Worker], placed: Placed[Worker], request: ValidRequest, failure: LegFailed
) -> None:
    """A transfer that was lost is the fault of neither worker; any other failure is that of its leg's.

    What a worker hands over when it leaves, or has another role, is no reason to rest it: nobody would try it again,
    and its circuit breaker would be open for ever.
    """
    breakers, prefill, decode = placement.breakers, placed.prefill, placed.decode
    cause = common_pb2.ErrorCode.Name(failure.error.code).removeprefix("ERROR_CODE_").lower()
    if isinstance(failure.error, TransferLost) and prefill is not None:
        if placement.has(prefill) and placement.has(decode):
            breakers.failed("transfer", cause, prefill.worker_id, decode.worker_id)
    elif failure.leg == "prefill" and prefill is not None:
        if placement.has(prefill) and prefill.can_prefill:
            breakers.failed("prefill", cause, prefill.worker_id)
    elif placement.has(decode) and (decode.can_decode or request.is_one_token):
        breakers.failed("decode", cause, decode.worker_id)
