"""Artifacts that several tests share, compiled once a session."""

import os

# The suites run tiny models: more threads than this only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import dllmc
from tests.golden.cases import FOLDERS, ROOT


@pytest.fixture(scope="session")
def golden_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dllmc.Engine]:
    """Folder of golden outputs -> an engine on its checkpoint, compiled with default options."""

    @cache
    def engine(folder: str) -> dllmc.Engine:
        assert folder in FOLDERS
        out = tmp_path_factory.mktemp("artifacts") / folder
        return dllmc.load(dllmc.compile(ROOT / folder, out).path)

    return engine


@pytest.fixture(scope="session")
def tiny_llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint, compiled."""
    source = Path(__file__).parents[1] / "examples" / "tiny-llada"
    return dllmc.compile(source, tmp_path_factory.mktemp("artifacts") / "tiny-llada").path
