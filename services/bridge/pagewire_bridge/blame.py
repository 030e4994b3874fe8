"""What the router refuses by its own name for it, told by the name of the field it came in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pagewire_core.errors import InvalidRequest


@contextmanager
def blaming(fields: Mapping[str, str]) -> Iterator[None]:
    """fields: of the body, each by its name elsewhere; others keep theirs, with the place in them."""
    try:
        yield
    except InvalidRequest as error:
        error.param = fields.get(error.param.partition("[")[0], error.param)
        raise
