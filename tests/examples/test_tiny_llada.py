"""The bundled checkpoint does what the README says, through its compiled artifact."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import dllmc

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-llada"


@pytest.fixture(scope="module")
def sudoku() -> ModuleType:
    """examples/tiny-llada/sudoku.py."""
    spec = importlib.util.spec_from_file_location("sudoku", FOLDER / "sudoku.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fits() -> None:
    """At most 8 MB, and its own figures say how often it solves what it never saw."""
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert json.loads((FOLDER / "training.json").read_text())["solved_held_out"] >= 0.99


def test_solves_fresh_puzzles(sudoku: ModuleType, tiny_llada: Path) -> None:
    """Dense greedy decoding solves at least 99 % of 200 held-out puzzles with 4 to 12 blanks."""
    fresh = sudoku.puzzles(np.random.default_rng(12345), held_out=True)
    prompts = [sudoku.prompt_of(next(fresh)[0]) for _ in range(200)]
    params = dllmc.SamplingParams(gen_length=19, block_length=19)
    results = dllmc.load(tiny_llada).generate(prompts, params)
    solved = sum(sudoku.is_solved(p, r.text) for p, r in zip(prompts, results, strict=True))
    assert solved >= 198


def test_checker_by_hand(sudoku: ModuleType) -> None:
    """288 grids; a solution must be valid, complete, and keep the givens."""
    prompt = "sudoku:\n1003\n0300\n3210\n4132\n"
    assert len(sudoku.GRIDS) == 288
    assert sudoku.is_solved(prompt, "1423\n2341\n3214\n4132")
    for wrong in (
        "2413\n1342\n3214\n4132",
        "1423\n2341\n3214\n4123",
        "1423\n2341\n3214",
        "",
        "1423\n2341\n3214\n41322",
    ):
        assert not sudoku.is_solved(prompt, wrong)
