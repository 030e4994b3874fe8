"""Everything that the OpenAPI document allows, and what it does not, asked of the running system by schemathesis.

python tests/fuzz_api.py [--examples 50] [--keys] [any option of `schemathesis run`, as --seed N]

Asserted are: no 5xx, no hang, statuses, headers and bodies as documented, nonsense refused, no method that is not
documented; at the end no leak. With --keys an administrator asks, also in sequences in which one request uses what an
earlier answer named, and whatever is documented to want a key must refuse who has none or a wrong one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import Cluster, running
from pagewire_bridge.keys import digest_of
from pagewire_cli.serve import demo_model

TESTS = Path(__file__).parent
FLAGS = ("--kv-cache-memory-bytes=8M", "--max-model-len=128", "--threads=1")
ROUTER_FLAGS = ("--served-model-name=demo",)
BRIDGE_FLAGS = ("--tool-call-parser=json", "--enable-auto-tool-choice")
# Nobody waits longer for an answer of at most 128 tokens, however busy the machine is.
HANG_S = 60
PHASES = "examples,coverage,fuzzing"  # those of the document, the limits in it, and at random
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
)  # fmt: skip


KEY = "sk-fuzz-admin"
WITH_KEYS = (  # beside the others, of which these take the place
    f"--phases={PHASES},stateful",
    f"--checks={','.join(CHECKS)},ignored_auth",
    f"--header=Authorization: Bearer {KEY}",
)


async def fuzz(cluster: Cluster, examples: int, options: Sequence[str]) -> dict[str, Any]:
    """examples: for each operation, besides those of the other phases. Returns schemathesis' report."""
    report = cluster.directory / "schemathesis.json"
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{cluster.base_url}/openapi.json",
        f"--max-examples={examples}", f"--checks={','.join(CHECKS)}", f"--request-timeout={HANG_S}",
        f"--phases={PHASES}", "--continue-on-failure", "--no-color", "--warnings=off",
        "--suppress-health-check=all", "--generation-database=none", "--report=json", f"--report-json-path={report}",
        *options,
    ]  # fmt: skip
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "fuzz_api_hooks", "PYTHONPATH": str(TESTS)}
    process = await asyncio.create_subprocess_exec(*command, env=environment, cwd=cluster.directory)
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
    await cluster.settle()
    found: dict[str, Any] = json.loads(report.read_text())
    assert process.returncode == found["exit_code"]
    return found


async def main(examples: int, with_keys: bool, options: Sequence[str]) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        bridge_flags = list(BRIDGE_FLAGS)
        if with_keys:
            keys = Path(directory) / "keys.yaml"
            keys.write_text(f"- {{name: fuzz, sha256: {digest_of(KEY)}, admin: true}}\n")
            bridge_flags.append(f"--api-keys-file={keys}")
        cluster = Cluster(
            demo_model(), Path(directory), worker_flags=FLAGS, router_flags=ROUTER_FLAGS, bridge_flags=bridge_flags
        )
        async with running(cluster):
            found = await fuzz(cluster, examples, [*(WITH_KEYS if with_keys else ()), *options])
    tested, cases = found["operations"]["tested"], found["test_cases"]
    print(f"{tested} operations, {cases['generated']} requests, {cases['unique_failures']} failures")
    return found["exit_code"] == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--keys", action="store_true", help="ask with a key, of a server that wants one")
    known, others = parser.parse_known_args()
    sys.exit(not asyncio.run(main(known.examples, known.keys, others)))
