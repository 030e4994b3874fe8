"""Checkpoints and clusters that several end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")
