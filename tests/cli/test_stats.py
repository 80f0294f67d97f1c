"""`--stats`: the line of what an engine does, and where it is shown."""

import re
from pathlib import Path

import pytest

import dllmc
from dllmc.cli.stats import line
from dllmc.runtime.metrics import PhaseStats
from tests.cli.test_commands import PUZZLE, SOLUTION, run


def test_the_line() -> None:
    stats = dllmc.Stats(
        waiting=3,
        running=4,
        finished=5,
        pages=64,
        pages_in_use=12,
        tokens=100,
        phases={"refresh": PhaseStats(2, 0.05), "mixed": PhaseStats(3, 0.2), "dense": PhaseStats()},
    )
    assert line(stats) == (
        "3 waiting, 4 running, 5 finished; 400 tokens/s; mixed 66.7 ms x 3, refresh 25.0 ms x 2; 12 of 64 pages"
    )
    told = line(dllmc.Stats(preemptions=2, cancelled=1, failed=3))
    assert told.endswith("; 0 tokens/s; no steps; 0 of 0 pages; 2 preempted; 1 cancelled; 3 failed")


@pytest.mark.parametrize("more", [(), ("--watch",)])
def test_without_a_terminal_the_last_line_is_printed(tiny_llada: Path, more: tuple[str, ...]) -> None:
    result = run("generate", tiny_llada, "--stats", "--gen-length", "20", "--cache", "block", "--prompt", PUZZLE, *more)
    assert result.exit_code == 0
    assert result.stdout.strip() == SOLUTION.strip()
    found = re.findall(
        r"^\[0 waiting, 0 running, 1 finished; \d+ tokens/s; (.*); 0 of \d+ pages\]$", result.stderr, re.M
    )
    assert len(found) == 1
    assert re.fullmatch(r"refresh [\d.]+ ms x 1, reuse [\d.]+ ms x 19", found[0])


def test_stop_texts(tiny_llada: Path) -> None:
    r"""\n is a newline, as in prompts."""
    result = run("generate", tiny_llada, "--stop", r"\n", "--stop", "x", "--prompt", PUZZLE)
    assert result.stdout.strip() == SOLUTION.splitlines()[0]
    assert "stop" in result.stderr
