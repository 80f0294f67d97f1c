"""The README's examples, run as they stand: every console command and every line of Python, with their output."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a reader would stand: the repository's examples, and nothing that was compiled before."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def console_examples() -> list[tuple[str, str]]:
    """(command, output) of every `$` line in the console blocks, in order; `make` is what runs this test."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    found = [
        example for block in blocks for example in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    ]
    return [(command, output) for command, output in found if command.startswith("dllmc ")]


def test_console(workplace: Path) -> None:
    """Each command prints exactly what the README shows."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    examples = console_examples()
    assert len(examples) >= 3
    for command, output in examples:
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(
            command,
            shell=True,
            cwd=workplace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.stdout == output, command


def test_python(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python session prints what the README shows, after the console's commands."""
    monkeypatch.chdir(workplace)
    sessions = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(sessions, {}, "README.md", "README.md", 0)
    assert len(test.examples) >= 5
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test).failed == 0


def test_figures_are_the_benchmarks() -> None:
    """The README's table of figures has the rows of benchmarks/results/decode_cpu.json, and no others."""
    records = json.loads((ROOT / "benchmarks" / "results" / "decode_cpu.json").read_text())["results"]
    rows = [
        f"| {r['method']} | {r['requests']} | {r['tokens_per_s']:.1f} | {r['speedup']:.2f}x "
        f"| {r['memory_bytes'] / 2**20:.0f} MiB | {r['same_tokens']:.0%} |"
        for r in records
    ]
    section = README.split("## First figures")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")][2:] == rows
