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
    """lines: legend -> PromQL; a legend may name labels, as in {{instance}}.

    colours: of a stat, each from a value on; the first from the least.
    """

    title: str
    lines: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    columns: int = 8
    description: str = ""
    low: float | None = 0
    high: float | None = None
    decimals: int | None = None
    colours: tuple[tuple[str, float | None], ...] = ()


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[Panel, ...]


def count(title: str, lines: dict[str, str], **fields: Any) -> Panel:
    """Of things that are there now, which are whole."""
    return Panel(title, lines, decimals=0, **fields)


def share(title: str, part: str, colours: tuple[tuple[str, float | None], ...]) -> Panel:
    """In one number, of all the time that is shown."""
    over_all = part.replace("$__rate_interval", "$__range")
    return Panel(title, {"share": over_all}, "percentunit", "stat", high=1, decimals=2, colours=colours)


def quantiles(metric: str, by: str = "", where: str = "", of: tuple[int, ...] = (50, 95, 99)) -> dict[str, str]:
    """Quantiles of a histogram, in percent, for each value of a label."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    buckets = rate(f"{metric}_bucket", labels, where)
    return {f"p{q}{legend}": f"histogram_quantile({q / 100}, {buckets})" for q in of}


def rate_of(counter: str) -> str:
    return f"rate({counter}[$__rate_interval])"


def rate(metric: str, by: str = "", where: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} ({rate_of(metric + where)})"


def ratio(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


# As all bridges tell of it, who scrapes several has it several times.
_ROLES = "max by (instance, role) (pagewire_worker_info)"


def by_role(expression: str) -> str:
    """Of workers, summed by the role that they have now."""
    return f"sum by (role) ({expression} * on (instance) group_left (role) {_ROLES})"


_KV_USAGE = f"1 - {by_role('pagewire_engine_free_blocks')} / {by_role('pagewire_engine_total_blocks')}"
_TTFT, _ITL = "pagewire_time_to_first_token_seconds", "pagewire_inter_token_latency_seconds"
_REQUESTS, _ERRORS = "pagewire_requests_total", '{outcome=~"internal|unavailable|deadline"}'
_COMPUTED, _CACHED = (rate_of(f"pagewire_engine_prompt_tokens_{what}_total") for what in ("computed", "cached"))
_API = '{route!~"/(health|ping|version|metrics|v2/health/.*)"}'
_FEW_ERRORS: tuple[tuple[str, float | None], ...] = (("green", None), ("orange", 0.005), ("red", 0.02))
_MOST: tuple[tuple[str, float | None], ...] = (("red", None), ("orange", 0.9), ("green", 0.95))

OVERVIEW = Dashboard("pagewire-overview", "pagewire: overview", (
    Panel("Requests", {"ok": rate(_REQUESTS, where='{outcome="ok"}'),
                       "{{outcome}}": rate(_REQUESTS, "outcome", '{outcome!="ok"}')}, "reqps"),
    Panel("Tokens a second", {"generated": rate("pagewire_generation_tokens_total"),
                              "of prompts": rate("pagewire_prompt_tokens_total"),
                              "of prompts, cached": rate("pagewire_cached_tokens_total")}),
    count("In flight", {"running": "sum(pagewire_running_requests)", "queued": "sum(pagewire_queued_requests)"}),
    Panel("Time to first token", quantiles(_TTFT), "s"),
    Panel("Time between tokens", quantiles(_ITL), "s"),
    Panel("Whole requests", quantiles("pagewire_e2e_seconds"), "s"),
    Panel("KV in use", {"{{role}}": _KV_USAGE}, "percentunit", high=1),
    count("Workers", {"{{role}}": f"count by (role) ({_ROLES})"}),
    Panel("HTTP answers", {"{{status}}": rate("pagewire_bridge_requests_total", "status", _API)}, "reqps",
          description="By status; 499: the client left. Without probes and scrapes."),
    count("Envoy: healthy upstreams", {"{{envoy_cluster_name}}": "sum by (envoy_cluster_name) "
          '(envoy_cluster_membership_healthy{envoy_cluster_name=~"bridge|router"})'}),
    Panel("Attempts lost", {"{{leg}}": rate("pagewire_retries_total", "leg")}, "reqps",
          description="Their requests go on elsewhere with the same tokens."),
    count("Redis and the index", {"Redis connected": "min(pagewire_redis_connected)",
                                  "index level": "max(pagewire_index_level)"},
          description="Index level 0: it follows Redis. 1 to 3: how far it does without."),
))  # fmt: skip

BALANCE = Dashboard("pagewire-balance", "pagewire: prefill and decode", (
    Panel("Plans", {"{{decision}}": rate("pagewire_route_total", "decision")}, "reqps",
          description="A pair of workers, or one worker alone."),
    count("Waiting", {"{{role}}": by_role("pagewire_engine_num_waiting")}),
    count("Running", {"{{role}}": by_role("pagewire_engine_num_running")}),
    Panel("Prompt tokens computed a second", {"{{role}}": by_role(_COMPUTED)}),
    Panel("Tokens sampled a second", {"{{role}}": by_role(rate_of("pagewire_engine_tokens_sampled_total"))}),
    Panel("KV in use", {"{{role}}": _KV_USAGE}, "percentunit", high=1),
    Panel("Steps a second", {"{{instance}}": rate_of("pagewire_engine_steps_total")}),
    Panel("Preemptions a second", {"{{instance}}": rate_of("pagewire_engine_preemptions_total")}),
    count("Reserved blocks", {"{{instance}}": "pagewire_engine_reserved_blocks"},
          description="Promised to transfers, pages not yet bound."),
    Panel("Stages, on average", {"{{stage}}": ratio(rate("pagewire_stage_seconds_sum", "stage"),
                                                    rate("pagewire_stage_seconds_count", "stage"))}, "s", columns=12),
    count("Admission queue", {"prompt tokens": "sum(pagewire_queued_prompt_tokens)"}, columns=12),
))  # fmt: skip

TRANSFER = Dashboard("pagewire-transfer", "pagewire: KV transfer", (
    Panel("Bytes", {"{{lane}}": rate("pagewire_kv_transfer_bytes_total", "lane", '{direction="sent"}')}, "Bps"),
    Panel("Transfers", {"ok": rate("pagewire_kv_transfers_total", where='{direction="sent",outcome="ok"}'),
                        "{{outcome}}": rate("pagewire_kv_transfers_total", "outcome",
                                            '{direction="sent",outcome!="ok"}')}, "ops"),
    Panel("Hidden behind computation, on average", {"{{lane}}": ratio(
        rate("pagewire_kv_overlap_ratio_sum", "lane"), rate("pagewire_kv_overlap_ratio_count", "lane"))},
        "percentunit", high=1, description="Share of a transfer's time in which its prompt was still being computed."),
    Panel("Time of a transfer", quantiles("pagewire_kv_transfer_seconds", "lane"), "s"),
    Panel("Tail after the first token", quantiles("pagewire_kv_tail_seconds", "lane"), "s",
          description="What handing over adds once the prompt is computed."),
    Panel("Rate of a transfer", quantiles("pagewire_kv_transfer_bytes_per_second", "lane"), "Bps"),
    Panel("Chunks damaged and resent", {"damaged": rate("pagewire_kv_checksum_failures_total"),
                                        "sent again": rate("pagewire_kv_chunk_resends_total")}, "ops", columns=12),
    count("Open pairs and staging slots", {"pairs, at both ends": "sum(pagewire_kv_pairs)",
                                           "staging slots": "sum(pagewire_kv_staging_slots)"}, columns=12),
))  # fmt: skip

CACHE = Dashboard("pagewire-cache", "pagewire: prefix cache", (
    Panel("Cached share of prompts", {"cached": ratio(rate("pagewire_cached_tokens_total"),
                                                      rate("pagewire_prompt_tokens_total"))}, "percentunit", high=1),
    Panel("Cached share by worker", {"{{instance}}": ratio(_CACHED, f"({_CACHED} + {_COMPUTED})")}, "percentunit",
          high=1),
    Panel("Prefixes fetched from other workers", {"{{outcome}}": rate("pagewire_kv_fetches_total", "outcome")}, "ops",
          description="Given up: it took longer than computing the prefix, or nobody waited any more."),
    Panel("Expected and not there", {"false hits": ratio(rate("pagewire_false_hit_tokens_total"),
                                                         rate("pagewire_expected_hit_tokens_total"))}, "percentunit",
          description="Of the cached tokens that workers were chosen for."),
    Panel("Tokens there and not expected, a second", {"tokens": rate("pagewire_unexpected_hit_tokens_total")}),
    count("Blocks in the index", {"blocks": "sum(pagewire_index_blocks)"}),
    Panel("Index incomplete for", {"age": "max(pagewire_index_age_seconds)"}, "s", columns=12),
    Panel("Gaps mended", {"{{mended_by}}": rate("pagewire_index_gaps_total", "mended_by")}, "ops", columns=12,
          description="Events of a worker were lost; by what the index knows its blocks again."),
))  # fmt: skip

SLO = Dashboard("pagewire-slo", "pagewire: objectives", (
    share("Errors of the server", ratio(rate(_REQUESTS, where=_ERRORS), rate(_REQUESTS)), _FEW_ERRORS),
    share("First token within 2 s", ratio(rate(f"{_TTFT}_bucket", where='{le=~"2|2.0"}'), rate(f"{_TTFT}_count")),
          _MOST),
    share("Tokens within 80 ms", ratio(rate(f"{_ITL}_bucket", where='{le="0.08"}'), rate(f"{_ITL}_count")), _MOST),
    Panel("Time to first token", quantiles(_TTFT), "s", columns=12),
    Panel("Time between tokens", quantiles(_ITL), "s", columns=12),
    Panel("Waiting for admission", quantiles("pagewire_router_queue_seconds"), "s"),
    Panel("Predicted time to first token", quantiles("pagewire_predicted_seconds", "plan", '{term="ttft"}'), "s"),
    Panel("Error of the prediction", quantiles("pagewire_prediction_error_seconds", "plan", '{term="ttft"}',
                                               of=(5, 50, 95)), "s", low=None,
          description="What it took, less what was predicted: above 0 it took longer."),
    count("Circuit breakers open", {"{{leg}}": "sum by (leg) (pagewire_circuits_open)"}, columns=12),
    Panel("Answered 429", {"rejected": rate(_REQUESTS, where='{outcome="rejected"}')}, "reqps", columns=12),
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
        "graphTooltip": 1,  # one crosshair on all panels
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
        "fieldConfig": {"defaults": _field(panel), "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(panel.lines.items())
        ],
    }


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit, "min": panel.low, "max": panel.high, "decimals": panel.decimals}
    if panel.colours:
        steps = [{"color": colour, "value": value} for colour, value in panel.colours]
        field["thresholds"] = {"mode": "absolute", "steps": steps}
    return {name: value for name, value in field.items() if value is not None}


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, dashboard in DASHBOARDS.items():
        (HERE / f"{name}.json").write_text(rendered(dashboard))


if __name__ == "__main__":
    main()
