"""`--device`: of what is compiled, and where it runs."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import dllmc
from dllmc.cli import main
from tests.golden.cases import ROOT

SHORT = ("--prompt-ids", "5,6,7", "--gen-length", "4", "--block-length", "4")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="dllmc")


@pytest.fixture(scope="module")
def for_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled by the command."""
    out = tmp_path_factory.mktemp("device") / "out"
    result = run("compile", ROOT / "llada-mha", out, "--device", "cuda", "--max-tokens-per-step", "64")
    assert result.exit_code == 0, result.output
    return out


def test_a_cpu_generates_with_what_was_compiled_for_cuda(for_cuda: Path) -> None:
    """When it is told to."""
    assert dllmc.load(for_cuda, "cpu").artifact.device == "cuda"
    assert run("generate", for_cuda, "--device", "cpu", *SHORT).exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_refusal_says_what_to_do(for_cuda: Path) -> None:
    """One line, from `generate` and from `eval`; but `verify` only looks."""
    for command in (("generate", for_cuda, *SHORT), ("eval", for_cuda, "--task", "add", "--examples", "1")):
        result = run(*command)
        assert result.exit_code != 0
        assert "torch finds no CUDA device on this machine" in result.output
        assert "--device cpu" in result.output
    assert run("verify", for_cuda).exit_code == 0


def test_what_was_compiled_for_a_cpu_stays_there(tiny_llada: Path) -> None:
    result = run("generate", tiny_llada, "--device", "cuda", *SHORT)
    assert result.exit_code != 0
    assert 'compiled for cpu, so it cannot run on cuda; compile with device="cuda"' in result.output
