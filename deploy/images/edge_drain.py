#!/usr/bin/env python3
"""Ends an Envoy's work without cutting anybody off: `pagewire-edge-drain SECONDS`, before it is sent SIGTERM.

It says that it is not ready and closes connections that have nothing under way, so that clients and load balancers go
elsewhere; then it waits until every answer has ended, at most for so many seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from urllib.request import ProxyHandler, Request, build_opener

_envoy = build_opener(ProxyHandler({}))  # the way to it is not by a proxy that the pod is told of


def main() -> None:
    parser = argparse.ArgumentParser(prog="pagewire-edge-drain")
    parser.add_argument("limit", type=float, metavar="SECONDS")
    parser.add_argument("--admin", default="127.0.0.1:9901", metavar="HOST:PORT")
    parser.add_argument("--seen-within", type=float, default=8.0, metavar="SECONDS",
                        help="by then whoever sends requests here has seen that it is not ready")  # fmt: skip
    args = parser.parse_args()
    drain(args.admin, args.limit, args.seen_within)


def drain(admin: str, limit_s: float, seen_s: float) -> None:
    begin = time.monotonic()
    for path in ("/healthcheck/fail", "/drain_listeners?graceful&skip_exit"):
        _post(admin, path)
    while (spent := time.monotonic() - begin) < limit_s and (spent < seen_s or _num_active(admin)):
        time.sleep(0.2)


def _post(admin: str, path: str) -> None:
    _envoy.open(Request(f"http://{admin}{path}", method="POST"), timeout=5).close()


def _num_active(admin: str) -> int:
    """Requests of clients that are not answered to the end."""
    with _envoy.open(
        f"http://{admin}/stats?format=json&filter=^http\\.(http|grpc)\\.downstream_rq_active$", timeout=5
    ) as it:
        stats = json.load(it)["stats"]
    return sum(stat["value"] for stat in stats)


if __name__ == "__main__":
    main()
