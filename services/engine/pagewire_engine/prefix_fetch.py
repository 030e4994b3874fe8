"""What a servicer needs to get a prompt's beginning from another worker instead of computing it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Seq

from pagewire.v1 import common_pb2 as pb

# (prompt, cache root, holder): the prefix cache has what was fetched, and nobody holds it there: requests that wait for
# blocks while they held some could wait for each other. Never fails: what did not come, or has gone again, is computed.
Fetch = Callable[[Seq[int], bytes, pb.KvHolder], Awaitable[pb.Fetched]]


async def fetch_nothing(prompt: Seq[int], cache_root: bytes, holder: pb.KvHolder) -> pb.Fetched:
    return pb.Fetched()
