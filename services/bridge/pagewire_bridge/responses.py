"""Whole JSON responses, and the status of an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import STATUS, PagewireError
from starlette.responses import Response

from pagewire_bridge.json_text import written

_TRY_AGAIN = (429, 503, 529)


def json_response(
    content: Mapping[str, object] | Sequence[object], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(written(content), status, headers, media_type="application/json")


def http_status(error: PagewireError) -> int:
    # The call was cancelled behind us, not by the client: it is still there to read this.
    return 503 if error.code == pb.ERROR_CODE_CANCELLED else STATUS[error.code][1]


def retry_after(error: PagewireError, status: int) -> dict[str, str] | None:
    """The header Retry-After (whole seconds) where trying again makes sense."""
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))} if status in _TRY_AGAIN else None
