"""What a servicer needs to get a prompt's beginning from another worker instead of computing it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractAsyncContextManager

from pagewire.v1 import common_pb2 as pb

# (prompt, cache root, holder): the prefix cache holds what was fetched while the body runs. Never fails: what did not
# come is computed.
Fetch = Callable[[Seq[int], bytes, pb.KvHolder], AbstractAsyncContextManager[pb.Fetched]]


@contextlib.asynccontextmanager
async def fetch_nothing(prompt: Seq[int], cache_root: bytes, holder: pb.KvHolder) -> AsyncIterator[pb.Fetched]:
    yield pb.Fetched()
