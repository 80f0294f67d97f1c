"""The command line, run in-process: what a user types and reads."""

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import dllmc
from dllmc.cli import DEFAULTS, main, size
from tests.golden.cases import ROOT

PUZZLE = r"sudoku:\n1003\n0300\n3210\n4132\n"
SOLUTION = "1423\n2341\n3214\n4132\n"


def run(*arguments: str | Path) -> Result:
    """Run `dllmc ARGUMENTS`."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_compile_prints_the_memory_equation(tmp_path: Path) -> None:
    """Prints weights + arena + kv_pool + state = total, what each pass did, and where the artifact is."""
    result = run("compile", ROOT / "llada-mha", tmp_path / "out", "--max-tokens-per-step", "512")
    assert result.exit_code == 0, result.output
    memory = dllmc.load(tmp_path / "out").artifact.memory
    parts = [memory[name] for name in ("weights", "arena", "kv_pool", "state")]
    assert sum(parts) == memory["total"]
    assert f"weights {size(parts[0])} + arena {size(parts[1])} + kv_pool 0 B + state {size(parts[3])}" in result.output
    assert "fuse-head" in result.output
    assert f"wrote {tmp_path / 'out'}" in result.output


def test_generate_text(tiny_llada: Path) -> None:
    r"""A text prompt with \n escapes gives the completion on stdout, the count of passes on stderr."""
    result = run("generate", tiny_llada, "--prompt", PUZZLE, "--gen-length", "19", "--block-length", "19")
    assert result.stdout == SOLUTION
    assert "19 tokens, 19 forward passes" in result.stderr


def test_generate_token_ids(tiny_llada: Path) -> None:
    """Several prompts, as ids or text, come out in order of their kinds; options reach the decoder."""
    tokenizer = dllmc.load(tiny_llada).tokenizer
    assert tokenizer is not None
    ids = ",".join(map(str, tokenizer.encode(PUZZLE.replace("\\n", "\n"))))
    length = ("--gen-length", "19", "--block-length", "19", "--threshold", "0.9")
    result = run("generate", tiny_llada, "--prompt-ids", ids, "--prompt", PUZZLE, *length)
    assert result.stdout == SOLUTION * 2


def test_inspect(tiny_llada: Path) -> None:
    """The model, the program and its limits, the pass log, the memory; with --program every instruction."""
    short, full = run("inspect", tiny_llada), run("inspect", tiny_llada, "--program")
    for wanted in ("mask 1", "4096 tokens", "select-logit-rows", "weights", "kv_pool", "optimal"):
        assert wanted in short.output
    assert full.output.startswith(short.output)
    assert "dllmc.decode_head.default(" in full.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "nowhere/at/all", "out"), "nowhere/at/all"),
        (("inspect", "nowhere"), "nowhere/manifest.json: no such file"),
        (("generate", "nowhere", "--prompt", "x"), "nowhere/manifest.json: no such file"),
        (("generate", "ARTIFACT"), "at least one --prompt or --prompt-ids"),
        (("generate", "ARTIFACT", "--prompt-ids", "1,x"), "expected token ids such as 12,7,300"),
        (("generate", "ARTIFACT", "--prompt-ids", "1", "--steps", "3", "--threshold", "0.5"), "at most one"),
        (("generate", "ARTIFACT", "--prompt-ids", "1", "--gen-length", "9999"), "512"),
        (("compile", "CHECKPOINT", "out", "--passes", "fuse-everything"), "no pass is named 'fuse-everything'"),
        (("compile", "CHECKPOINT", "out", "--max-requests", "0"), "max_requests"),
    ],
)
def test_errors_are_short_and_exit_with_2(
    arguments: tuple[str, ...], message: str, tiny_llada: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake gets a message with what to do next, no traceback, and exit code 2."""
    monkeypatch.chdir(tmp_path)
    known = {"ARTIFACT": str(tiny_llada), "CHECKPOINT": str(ROOT / "llada-mha")}
    result = run(*(known.get(a, a) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_defaults_are_those_of_the_api() -> None:
    """--help shows the defaults of CompileOptions and SamplingParams without importing them."""
    api = {f.name: f.default for cls in (dllmc.CompileOptions, dllmc.SamplingParams) for f in fields(cls)}
    assert {name: api[name] for name in DEFAULTS} == DEFAULTS


def test_sizes_for_people() -> None:
    """Bytes are shown in the largest unit that keeps them above one, to four digits."""
    assert [size(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3 MiB", "5 GiB"]
