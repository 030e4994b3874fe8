"""redis-py, without what it imports for metrics of its own.

It imports OpenTelemetry's metrics wherever they are installed: a tenth of a second of every start, for what nobody
asked for. So this is the one place that imports it.
"""

from __future__ import annotations

import sys

_HIDDEN = {name: sys.modules.get(name) for name in ("opentelemetry.metrics", "opentelemetry.sdk.metrics")}
sys.modules.update(dict.fromkeys(_HIDDEN))  # type: ignore[arg-type]  # None: there is no such module
try:
    from redis.asyncio import Redis, SSLConnection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
finally:
    for name, module in _HIDDEN.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module

__all__ = ["NoBackoff", "Redis", "RedisError", "Retry", "SSLConnection"]
