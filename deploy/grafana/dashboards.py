"""Makes the Grafana dashboards: `python deploy/grafana/dashboards.py` writes dashboards/*.json beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _HEIGHT = 24, 8


@dataclass(frozen=True)
class Panel:
    """lines: legend -> PromQL; a legend may name labels, as in {{instance}}."""

    title: str
    lines: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    columns: int = 8
    description: str = ""


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[Panel, ...]


def quantiles(metric: str, by: str = "", where: str = "") -> dict[str, str]:
    """p50, p95 and p99 of a histogram, for each value of a label."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    rate = f"sum by ({labels}) (rate({metric}_bucket{where}[$__rate_interval]))"
    return {f"p{q}{legend}": f"histogram_quantile(0.{q}, {rate})" for q in (50, 95, 99)}


def rate(metric: str, by: str = "", where: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{where}[$__rate_interval]))"


def ratio(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


def of_pool(expression: str) -> str:
    """Summed by pool, which is what a worker's name begins with."""
    return f'sum by (pool) (label_replace({expression}, "pool", "$1", "instance", "(prefill|decode|both)-.*"))'


_KV_USAGE = f"1 - {of_pool('pagewire_engine_free_blocks')} / {of_pool('pagewire_engine_total_blocks')}"
_TTFT, _ITL = "pagewire_time_to_first_token_seconds", "pagewire_inter_token_latency_seconds"
_ERRORS = rate("pagewire_requests_total", where='{outcome=~"internal|unavailable|deadline"}')

OVERVIEW = Dashboard("pagewire-overview", "pagewire: overview", (
    Panel("Requests", {"{{outcome}}": rate("pagewire_requests_total", "outcome")}, "reqps"),
    Panel("Tokens", {"generated": rate("pagewire_generation_tokens_total"),
                     "of prompts": rate("pagewire_prompt_tokens_total"),
                     "of prompts, cached": rate("pagewire_cached_tokens_total")}),
    Panel("In flight", {"running": "sum(pagewire_running_requests)", "queued": "sum(pagewire_queued_requests)"}),
    Panel("Time to first token", quantiles(_TTFT), "s"),
    Panel("Time between tokens", quantiles(_ITL), "s"),
    Panel("Whole requests", quantiles("pagewire_e2e_seconds"), "s"),
    Panel("KV in use", {"{{pool}}": _KV_USAGE}, "percentunit"),
    Panel("Workers", {"{{pool}}": of_pool("pagewire_engine_total_blocks > bool 0")}),
    Panel("HTTP", {"{{status}}": rate("pagewire_bridge_requests_total", "status")}, "reqps"),
    Panel("Envoy: healthy upstreams", {"{{envoy_cluster_name}}": "sum by (envoy_cluster_name) "
          '(envoy_cluster_membership_healthy{envoy_cluster_name=~"bridge|router"})'}),
    Panel("Attempts lost", {"{{leg}}": rate("pagewire_retries_total", "leg")}, "reqps",
          description="Their requests go on elsewhere with the same tokens."),
    Panel("Redis", {"connected": "min(pagewire_redis_connected)", "index level": "max(pagewire_index_level)"}),
))  # fmt: skip

BALANCE = Dashboard("pagewire-balance", "pagewire: prefill and decode", (
    Panel("Plans", {"{{decision}}": rate("pagewire_route_total", "decision")}, "reqps",
          description="A pair of workers, or a decode worker alone."),
    Panel("Waiting", {"{{pool}}": of_pool("pagewire_engine_num_waiting")}),
    Panel("Running", {"{{pool}}": of_pool("pagewire_engine_num_running")}),
    Panel("Prompt tokens computed", {"{{pool}}": of_pool("rate(pagewire_engine_prompt_tokens_computed_total[1m])")}),
    Panel("Tokens sampled", {"{{pool}}": of_pool("rate(pagewire_engine_tokens_sampled_total[1m])")}),
    Panel("KV in use", {"{{pool}}": _KV_USAGE}, "percentunit"),
    Panel("Steps a second", {"{{instance}}": "rate(pagewire_engine_steps_total[1m])"}),
    Panel("Preemptions", {"{{instance}}": "rate(pagewire_engine_preemptions_total[5m])"}),
    Panel("Reserved blocks", {"{{instance}}": "pagewire_engine_reserved_blocks"},
          description="Promised to transfers, pages not yet bound."),
    Panel("Stages", {"{{stage}}": "sum by (stage) (rate(pagewire_stage_seconds_sum[1m])) / "
                                  "(sum by (stage) (rate(pagewire_stage_seconds_count[1m])) > 0)"}, "s", columns=12),
    Panel("Admission queue", {"prompt tokens": "sum(pagewire_queued_prompt_tokens)"}, columns=12),
))  # fmt: skip

TRANSFER = Dashboard("pagewire-transfer", "pagewire: KV transfer", (
    Panel("Bytes", {"{{lane}}": rate("pagewire_kv_transfer_bytes_total", "lane", '{direction="sent"}')}, "Bps"),
    Panel("Transfers", {"{{outcome}}": rate("pagewire_kv_transfers_total", "outcome", '{direction="sent"}')}, "ops"),
    Panel("Hidden behind computation", {"mean {{lane}}": "sum by (lane) (rate(pagewire_kv_overlap_ratio_sum[5m])) / "
          "(sum by (lane) (rate(pagewire_kv_overlap_ratio_count[5m])) > 0)"}, "percentunit"),
    Panel("Time of a transfer", quantiles("pagewire_kv_transfer_seconds", "lane"), "s"),
    Panel("Tail after the first token", quantiles("pagewire_kv_tail_seconds", "lane"), "s",
          description="What handing over adds once the prompt is computed."),
    Panel("Rate of a transfer", quantiles("pagewire_kv_transfer_bytes_per_second", "lane"), "Bps"),
    Panel("Damaged and resent", {"damaged {{instance}}": rate("pagewire_kv_checksum_failures_total", "instance"),
                                 "sent again {{instance}}": rate("pagewire_kv_chunk_resends_total", "instance")},
          "ops", columns=12),
    Panel("Held", {"pairs": "sum(pagewire_kv_pairs)", "staging slots": "sum(pagewire_kv_staging_slots)"}, columns=12),
))  # fmt: skip

CACHE = Dashboard("pagewire-cache", "pagewire: prefix cache", (
    Panel("Cached share of prompts", {"cached": ratio(rate("pagewire_cached_tokens_total"),
                                                      rate("pagewire_prompt_tokens_total"))}, "percentunit"),
    Panel("By worker", {"{{instance}}": "rate(pagewire_engine_prompt_tokens_cached_total[5m]) / "
          "(rate(pagewire_engine_prompt_tokens_cached_total[5m]) + "
          "rate(pagewire_engine_prompt_tokens_computed_total[5m]) > 0)"}, "percentunit"),
    Panel("Prefixes fetched from other workers", {"{{outcome}}": rate("pagewire_kv_fetches_total", "outcome")}, "ops"),
    Panel("Expected and not there", {"false hits": ratio(rate("pagewire_false_hit_tokens_total"),
                                                         rate("pagewire_expected_hit_tokens_total"))}, "percentunit"),
    Panel("There and not expected", {"tokens": rate("pagewire_unexpected_hit_tokens_total")}),
    Panel("Blocks in the index", {"blocks": "sum(pagewire_index_blocks)"}),
    Panel("Index incomplete for", {"age": "max(pagewire_index_age_seconds)"}, "s", columns=12),
    Panel("Gaps mended", {"{{mended_by}}": rate("pagewire_index_gaps_total", "mended_by")}, "ops", columns=12),
))  # fmt: skip

SLO = Dashboard("pagewire-slo", "pagewire: objectives", (
    Panel("Errors of the server", {"ratio": ratio(_ERRORS, rate("pagewire_requests_total"))}, "percentunit", "stat"),
    Panel("First token within 2 s", {"ratio": ratio(rate(f"{_TTFT}_bucket", where='{le=~"2|2.0"}'),
                                                    rate(f"{_TTFT}_count"))}, "percentunit", "stat"),
    Panel("Tokens within 80 ms", {"ratio": ratio(rate(f"{_ITL}_bucket", where='{le="0.08"}'),
                                                 rate(f"{_ITL}_count"))}, "percentunit", "stat"),
    Panel("Time to first token", quantiles(_TTFT), "s", columns=12),
    Panel("Time between tokens", quantiles(_ITL), "s", columns=12),
    Panel("Waiting for admission", quantiles("pagewire_router_queue_seconds"), "s"),
    Panel("Predicted time to first token", quantiles("pagewire_predicted_seconds", "plan", '{term="ttft"}'), "s"),
    Panel("Error of the prediction", quantiles("pagewire_prediction_error_seconds", "plan", '{term="ttft"}'), "s",
          description="What it took, less what was predicted."),
    Panel("Circuit breakers open", {"{{leg}}": "sum by (leg) (pagewire_circuits_open)"}, columns=12),
    Panel("Answered 429", {"rejected": rate("pagewire_requests_total", where='{outcome="rejected"}')}, "reqps",
          columns=12),
))  # fmt: skip

DASHBOARDS = {"overview": OVERVIEW, "balance": BALANCE, "transfer": TRANSFER, "cache": CACHE, "slo": SLO}


def rendered(dashboard: Dashboard) -> str:
    return json.dumps(_dashboard(dashboard), indent=1) + "\n"


def _dashboard(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["pagewire"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": _placed(dashboard.panels),
    }


def _placed(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """From left to right, in rows of 24 columns."""
    placed, x, y = [], 0, 0
    for number, panel in enumerate(panels, 1):
        if x + panel.columns > _COLUMNS:
            x, y = 0, y + _HEIGHT
        placed.append(_panel(number, panel, {"x": x, "y": y, "w": panel.columns, "h": _HEIGHT}))
        x += panel.columns
    return placed


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": None}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(panel.lines.items())
        ],
    }


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, dashboard in DASHBOARDS.items():
        (HERE / f"{name}.json").write_text(rendered(dashboard))


if __name__ == "__main__":
    main()
