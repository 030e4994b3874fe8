"""Moments as the APIs that want text write them."""

from __future__ import annotations

import datetime


def rfc3339(seconds: float) -> str:
    """Of seconds since 1970, in UTC: 2026-01-31T12:00:00Z."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")
