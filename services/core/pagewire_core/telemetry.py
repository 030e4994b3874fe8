"""Logs and metrics, the same in every service.

Logs are structlog events: JSON lines, or a console rendering on a terminal. The request id is bound
to the context where a call enters, so that every line of a request carries it. Prompt text is not
logged, unless the router is told to (--enable-log-requests).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Mapping

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

disable_created_metrics()  # a series per counter that says only when the process started

LOG_FORMATS = ("auto", "json", "console")
LOG_LEVELS = ("debug", "info", "warning", "error")


class _Lines(structlog.WriteLogger):
    """One write a line: processes share a terminal. A line that cannot be written is lost.

    A full disk, or a reader of the pipe that has gone, is no reason to fail a request, or to end a service.
    """

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def configure_logging(service: str, log_format: str = "auto", level: str = "info") -> None:
    """Sets up structlog for this process; `auto` is console on a terminal and JSON elsewhere."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())

    def name_service(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"service": service, **event}

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            name_service,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if not console else structlog.processors.StackInfoRenderer(),
            # plain: the default traceback shows local variables, and with them prompt text
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
            if console
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: _Lines(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")


def instance_name(service: str, rank: int | None) -> str:
    """What its metrics call a router or a bridge. rank: which of several it is."""
    return service if rank is None else f"{service}-{rank}"


def exposition(registry: CollectorRegistry) -> str:
    """The registry in Prometheus' text format."""
    return generate_latest(registry).decode()


class _Families:
    """A collector over families that are already made."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def merge_expositions(texts: Mapping[str, str]) -> str:
    """Joins the metrics of several processes into one valid exposition; see merge_families."""
    return exposition_of(merge_families(texts).values())


def merge_families(texts: Mapping[str, str]) -> dict[str, Metric]:
    """By name, the metrics of several processes.

    texts: instance name -> Prometheus text. Every sample gets a label `instance`, unless it has one;
    a family named by several processes appears once.
    """
    merged: dict[str, Metric] = {}
    for instance, text in texts.items():
        for family in text_string_to_metric_families(text):
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples.extend(
                Sample(s.name, {"instance": instance, **s.labels}, s.value, s.timestamp, s.exemplar)
                for s in family.samples
            )
    return merged


def exposition_of(families: Iterable[Metric]) -> str:
    """The families in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(list(families)))  # type: ignore[arg-type]
    return exposition(registry)
