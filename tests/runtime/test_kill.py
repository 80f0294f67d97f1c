"""A process that is killed leaves nothing behind that stops the next one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dllmc
from dllmc import artifact
from dllmc.errors import ArtifactError

SERVE = """
import sys
import dllmc

with dllmc.load(sys.argv[1]) as engine:
    print("loaded", flush=True)
    while True:
        engine.generate(["add:1+2="] * 4, dllmc.SamplingParams(gen_length=6), dllmc.CachePolicy())
"""
WRITE = """
import sys
import dllmc

def begin(stage, done, stages):
    if stage == "write the artifact":
        print(stage, flush=True)

while True:
    dllmc.compile(sys.argv[1], sys.argv[2], on_stage=begin)
"""
COMPILE = "import sys, dllmc; print('started', flush=True); dllmc.compile(sys.argv[1], sys.argv[2])"
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llada"


def killed_after(code: str, *arguments: Path, seconds: float) -> None:
    """Run a program, and kill it so long after it has printed a line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(seconds)
        process.kill()


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("seconds", [0.3, pytest.param(0.0, marks=pytest.mark.slow)])
def test_while_it_decodes(tiny_llada: Path, seconds: float) -> None:
    before = listing(tiny_llada)
    killed_after(SERVE, tiny_llada, seconds=seconds)
    assert listing(tiny_llada) == before
    [result] = dllmc.load(tiny_llada).generate("add:1+2=", dllmc.SamplingParams(gen_length=6))
    assert result.text == "3"


@pytest.mark.parametrize("seconds", [2.0, *(pytest.param(n, marks=pytest.mark.slow) for n in (0.5, 1.0, 4.0))])
def test_while_it_compiles(tmp_path: Path, seconds: float) -> None:
    """Over an artifact that is there: either the old one is whole, or the new one."""
    out = tmp_path / "out.dllmc"
    dllmc.compile(EXAMPLE, out)
    killed_after(COMPILE, EXAMPLE, out, seconds=seconds)
    [before] = dllmc.load(out).generate("add:1+2=", dllmc.SamplingParams(gen_length=6))
    dllmc.compile(EXAMPLE, out)
    [after] = dllmc.load(out).generate("add:1+2=", dllmc.SamplingParams(gen_length=6))
    assert before.text == after.text == "3"


@pytest.mark.slow
def test_while_it_writes(tmp_path: Path) -> None:
    """Again and again within one process's writing: what is left is whole or nothing, and the next one clears it up."""
    out = tmp_path / "out.dllmc"
    dllmc.compile(EXAMPLE, out)
    expected = {name for name in listing(out) if name != "manifest.json"}
    for _ in range(3):
        killed_after(WRITE, EXAMPLE, out, seconds=random.uniform(0.0, 0.4))
        assert_whole_or_gone(out)
    dllmc.compile(EXAMPLE, out)
    assert os.listdir(tmp_path) == ["out.dllmc"]
    assert {name for name in listing(out) if name != "manifest.json"} == expected


@pytest.mark.slow
def test_while_it_writes_fifty_times(tmp_path: Path) -> None:
    """At moments drawn over the whole of writing, which takes about 0.3 s; `out` is there in most and not in all."""
    out = tmp_path / "out.dllmc"
    for index in range(50):
        killed_after(WRITE, EXAMPLE, out, seconds=0.4 * index / 50)
        assert_whole_or_gone(out)
        assert len([name for name in os.listdir(tmp_path) if name.startswith(".")]) <= 1
    dllmc.compile(EXAMPLE, out)
    assert os.listdir(tmp_path) == ["out.dllmc"]


def assert_whole_or_gone(out: Path) -> None:
    if out.exists():
        artifact.read(out)
    else:
        with pytest.raises(ArtifactError, match="no such file"):
            artifact.read(out)
