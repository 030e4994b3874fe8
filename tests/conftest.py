"""Fixtures that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import RedisServer, write_byte_tokenizer
from hypothesis import settings
from pagewire_core.tokenizer import Tokenizer

# Tests are not timed: on a busy machine an example may take what it takes.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A real Redis-compatible server; a test may kill and start it again."""
    server = RedisServer()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> Tokenizer:
    """One token per byte, so that every way to cut UTF-8 can be tried."""
    write_byte_tokenizer(tmp_path)
    return Tokenizer(tmp_path)
