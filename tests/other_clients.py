"""Clients whose dependencies clash with ours, from an environment of their own, on the running system.

python tests/other_clients.py PYTHON [option of pytest ...]: PYTHON has what tests/clients/requirements.txt names.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster import Cluster, running
from pagewire_cli.serve import demo_model

CLIENTS = Path(__file__).parent / "clients"
FLAGS = ("--kv-cache-memory-bytes=16M", "--max-model-len=512", "--threads=1")


async def main(python: str, options: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(
            demo_model(),
            Path(directory),
            worker_flags=FLAGS,
            router_flags=("--served-model-name=demo",),
            bridge_flags=("--tool-call-parser=json", "--enable-auto-tool-choice"),
        )
        async with running(cluster):
            files = map(str, sorted(CLIENTS.glob("*_client.py")))
            options = [
                "-c",
                os.devnull,
                "--noconftest",
                "-p",
                "no:cacheprovider",
                "--disable-warnings",
                "-ra",
                *options,
            ]
            command = [python, "-m", "pytest", *files, *options]
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            environment |= {"BASE_URL": cluster.base_url, "NO_PROXY": "127.0.0.1"}
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            return await process.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2:])))
