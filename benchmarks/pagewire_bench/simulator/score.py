"""What a run was worth: goodput, and the latencies behind it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pagewire_router.load import StepModel

from pagewire_bench.simulator.traces import Arrival

TTFT_S, ITL_S = 2.0, 0.05  # targets: to the first token, and between tokens on average
_ALONE = 2.0  # times what an idle worker takes: what a prompt may take for which TTFT_S is too little
_WARM = 0.4  # of the run that counts for nothing: caches fill, costs are learnt


@dataclass(frozen=True)
class Score:
    """goodput: requests per second that met both targets; attained: their share of all."""

    goodput: float
    attained: float
    ttft_attained: float
    itl_attained: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    local: float  # share that decode workers computed themselves

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def score(arrivals: Sequence[Arrival], seconds: float, model: StepModel) -> Score:
    counted = [a for a in arrivals if a.at >= _WARM * seconds]
    never = float("inf")
    ttft = [a.first_token - a.at if a.first_token is not None else never for a in counted]
    itl = [
        (a.finished - a.first_token) / max(a.output_tokens - 1, 1)
        if a.finished is not None and a.first_token is not None
        else never
        for a in counted
    ]
    limits = [max(TTFT_S, _ALONE * model.prefill_ms(len(a.prompt)) / 1000) for a in counted]
    soon = [t <= limit for t, limit in zip(ttft, limits, strict=True)]
    good = [ready and i <= ITL_S for ready, i in zip(soon, itl, strict=True)]
    return Score(
        goodput=sum(good) / ((1 - _WARM) * seconds),
        attained=statistics.fmean(good),
        ttft_attained=statistics.fmean(soon),
        itl_attained=statistics.fmean(i <= ITL_S for i in itl),
        ttft_p50_s=_quantile(ttft, 0.5),
        ttft_p99_s=_quantile(ttft, 0.99),
        itl_p50_s=_quantile(itl, 0.5),
        itl_p99_s=_quantile(itl, 0.99),
        local=statistics.fmean(a.plan == "local" for a in counted),
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
