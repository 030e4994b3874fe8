"""Where a request would be served now, and why: every plan with its terms, every worker, every circuit breaker."""

from __future__ import annotations

from pagewire.v1 import inference_pb2, worker_pb2

from pagewire_router.load import Load
from pagewire_router.placement import Placement, View
from pagewire_router.plan import Plan
from pagewire_router.policies import name_of
from pagewire_router.request import ValidRequest
from pagewire_router.workers import Worker

_MAX_CANDIDATES = 50


def explain(request: ValidRequest, placement: Placement[Worker]) -> inference_pb2.ExplainResponse:
    """Changes nothing: no work is booked and no turn taken."""
    view = placement.view(request)
    plans = placement.plans(view)
    chosen = placement.policy.best(plans) if plans else []
    return inference_pb2.ExplainResponse(
        policy=name_of(placement.policy),
        unit=placement.policy.unit,
        prompt_tokens=view.ask.prompt_tokens,
        output_tokens=view.ask.output_tokens,
        candidates=[
            _candidate(placement, view, plan, i < len(chosen)) for i, plan in enumerate(plans[:_MAX_CANDIDATES])
        ],
        workers=[_worker(load) for _, load in sorted(view.loads.items())],
        circuits=[
            inference_pb2.Circuit(
                leg=breaker.leg, workers=breaker.workers, cause=breaker.cause, state=state,
                failures=breaker.failures, retry_after_s=seconds,
            )
            for breaker, state, seconds in placement.breakers
        ],
    )  # fmt: skip


def _candidate(placement: Placement[Worker], view: View, plan: Plan, chosen: bool) -> inference_pb2.RouteCandidate:
    predicted = placement.predict(view, plan)
    return inference_pb2.RouteCandidate(
        prefill_worker=plan.prefill or "",
        decode_worker=plan.decode,
        cost=plan.cost,
        terms=[inference_pb2.CostTerm(name=name, value=value) for name, value in plan.terms.items()],
        may_be_chosen=chosen,
        predicted_ttft_ms=predicted.ttft_ms,
        predicted_transfer_ms=predicted.transfer_ms,
    )


def _worker(load: Load) -> inference_pb2.RouteWorker:
    model = load.model
    return inference_pb2.RouteWorker(
        worker_id=load.worker_id,
        role=load.role,  # type: ignore[arg-type]
        hit_tokens=load.hit_tokens,
        waiting_tokens=load.waiting_tokens,
        queue_ms=load.queue_ms,
        num_sequences=load.num_sequences,
        kv_tokens=load.kv_tokens,
        free_tokens=load.free_tokens,
        step_cost=worker_pb2.StepCost(
            prefill_base_ms=model.prefill_base_ms,
            prefill_ms_per_token=model.prefill_ms_per_token,
            prefill_ms_per_attended=model.prefill_ms_per_attended,
            decode_base_ms=model.decode_base_ms,
            decode_ms_per_sequence=model.decode_ms_per_sequence,
            decode_ms_per_kv_token=model.decode_ms_per_kv_token,
        ),
        kv_bytes_per_token=load.kv_bytes_per_token,
        max_num_seqs=load.max_num_seqs,
    )
