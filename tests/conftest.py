"""Artifacts that several tests share, compiled once a session; and the summary that `make test-all` writes."""

import os

# The suites run tiny models: more threads than this only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels are tested by interpretation; Triton asks when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dllmc
from tests.golden.cases import FOLDERS, ROOT

SUMMARY = Path(__file__).with_name("summary.json")
"""Of the last `make test-all`."""


def pytest_configure() -> None:
    """Under nohup SIGINT is ignored, and so it would be in the commands that tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """The bundled checkpoint of Sudoku and sums, compiled."""
    return compiled("tiny-llada", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_llada_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled language model of Python source, compiled."""
    return compiled("tiny-llada-code", tmp_path_factory)


def compiled(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of examples/, compiled with default options."""
    source = Path(__file__).parents[1] / "examples" / name
    return dllmc.compile(source, tmp_path_factory.mktemp("artifacts") / name).path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest suites come first, so that workers end together. What needs a CUDA device is skipped without one."""
    seconds = json.loads(SUMMARY.read_text())["seconds"]
    items.sort(key=lambda item: -seconds.get(item.nodeid.split("::")[0], 0.0))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--summary FILE`: write what ran, and how it went, as JSON."""
    parser.addoption("--summary", type=Path, help="write a JSON summary of the run")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the summary: outcomes, and seconds of each suite."""
    file = config.getoption("--summary")
    if file is None or hasattr(config, "workerinput"):  # the process that gathers the workers' reports writes it
        return
    reports = [r for kind in terminalreporter.stats.values() for r in kind if isinstance(r, pytest.TestReport)]
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[report.nodeid.split("::")[0]] += report.duration
    outcomes = Counter(r.outcome for r in reports if r.when == "call" or r.outcome != "passed")
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "outcomes": dict(outcomes),
        "seconds": {suite: round(spent, 1) for suite, spent in sorted(seconds.items())},
    }
    file.write_text(json.dumps(summary, indent=1) + "\n")
