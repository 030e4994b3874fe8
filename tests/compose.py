"""Runs compose.yaml for real and drives it: `make test-compose`, on a machine with a Docker engine.

    python tests/compose.py [--local]      --local: without a registry, see deploy/compose/local.yaml

Everybody becomes healthy; a chat through Envoy, streamed and not; a decode container is killed in the middle of a
stream, which goes on with the same tokens; a pool is scaled and its worker found; Prometheus has everybody's numbers;
nothing runs as root or writes to its image; all goes down.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
BASE, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:9090"
CHAT = {
    "model": "pagewire-demo", "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "temperature": 0, "max_tokens": 200, "ignore_eos": True,
}  # fmt: skip


class Compose:
    def __init__(self, files: list[str]) -> None:
        self._command = ["docker", "compose", *(part for file in files for part in ("-f", file))]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([*self._command, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE)
        assert done.returncode == 0, f"docker compose {' '.join(arguments)} failed"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        return self("ps", "-q", service).split()


def ask(path: str, body: dict[str, Any] | None = None, base: str = BASE) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(base + path, data, {"content-type": "application/json"}), timeout=120) as answer:
        return json.load(answer)


def stream(**fields: Any) -> Iterator[str]:
    """The pieces of a streamed chat; ends only with [DONE]."""
    request = Request(f"{BASE}/v1/chat/completions", json.dumps({**CHAT, "stream": True, **fields}).encode())
    with urlopen(request, timeout=120) as answer:
        for raw in answer:
            line = raw.decode().strip().removeprefix("data: ")
            if line == "[DONE]":
                return
            if line:
                event = json.loads(line)
                assert "error" not in event, event
                yield event["choices"][0]["delta"].get("content") or ""
    raise AssertionError("the stream ended without [DONE]")


def metric(query: str) -> float:
    found = ask(f"/api/v1/query?query={query}", base=PROMETHEUS)["data"]["result"]
    return float(found[0]["value"][1]) if found else 0.0


def until(what: str, condition: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.5)
    say(what)


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGIN:6.1f} s  {line}", flush=True)


BEGIN = time.monotonic()
KILLS = 8  # at most: each hits the worker that has the stream, or the other one


def check_confinement(compose: Compose) -> None:
    for service in ("prefill", "decode", "router", "bridge", "envoy", "redis"):
        for container in compose.containers(service):
            inspected = json.loads(subprocess.check_output(["docker", "inspect", container]))[0]
            host = inspected["HostConfig"]
            assert inspected["Config"]["User"] not in ("", "0", "root", "0:0"), service
            assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Privileged"], service
    say("nobody is root, root file systems are read-only, no capabilities")


def drive(compose: Compose) -> None:
    whole = ask("/v1/chat/completions", CHAT)["choices"][0]["message"]["content"]
    assert whole and "".join(stream()) == whole
    say(f"a chat through Envoy, streamed and not: {whole[:40]!r}...")
    check_confinement(compose)

    victims = compose.containers("decode")
    for i in range(KILLS):
        pieces, flowing = [], stream()
        pieces += [next(flowing) for _ in range(10)]
        subprocess.check_call(["docker", "kill", victims[i % 2]], stdout=subprocess.DEVNULL)
        pieces += flowing
        assert "".join(pieces) == whole, "the stream that outlived its worker has other tokens"
        subprocess.check_call(["docker", "start", victims[i % 2]], stdout=subprocess.DEVNULL)
        until(f"decode container {i % 2 + 1} killed in mid-stream; same text; it is back", lambda: num_workers() == 4)
        if i and was_resumed():
            break
    assert was_resumed(), "no stream was on a worker that was killed"

    compose("up", "-d", "--no-recreate", "--scale", "decode=3")
    until("a third decode worker is found", lambda: num_workers() == 5)
    until(
        "Prometheus scrapes everybody",
        lambda: metric("min(up)") == 1 and metric("count(pagewire_engine_steps_total)") >= 5,
    )


def num_workers() -> int:
    """As the router knows them."""
    return len(values_of("pagewire_engine_total_blocks"))


def was_resumed() -> bool:
    """Whether a stream has outlived its worker so far."""
    return sum(values_of("pagewire_resumed_requests_total")) >= 1 or sum(values_of("pagewire_retries_total")) >= 1


def values_of(name: str) -> list[float]:
    """Of a metric, by its labels; from those that the router merges."""
    with urlopen(f"{BASE}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local", action="store_true")
    args = parser.parse_args()
    compose = Compose(["compose.yaml", *(["deploy/compose/local.yaml"] if args.local else [])])
    try:
        compose("up", "-d", "--wait", "--no-build")
        say("all are healthy")
        drive(compose)
    except BaseException:
        print(compose("logs", "--tail", "40"))
        raise
    finally:
        compose("down", "-v", "-t", "25")
    say("all are down")


if __name__ == "__main__":
    main()
