"""Fixtures of the checkpoint tests."""

from pathlib import Path

import pytest

from tests.models.folders import NAMES, copy_of


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each of the golden checkpoints."""
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the LLaDA checkpoint, to be changed."""
    return copy_of("llada-mha", tmp_path)
