"""The bundled checkpoint does what the README says, through its compiled artifact."""

import json
from pathlib import Path

import pytest

import dllmc
from dllmc.evaluate import evaluate

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-llada"


def test_fits() -> None:
    """At most 8 MB, and its own figures say how often it solves what it never saw."""
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    figures = json.loads((FOLDER / "training.json").read_text())
    assert figures["sudoku_right"] >= 0.99
    assert figures["add_right"] >= 0.99


@pytest.mark.parametrize("task", ["sudoku", "add"])
def test_solves_fresh_examples(task: str, tiny_llada: Path) -> None:
    """Dense greedy decoding of 200 held-out examples, not those of the figures: 99 % lies in the sample's interval."""
    report = evaluate(dllmc.load(tiny_llada), task, count=200, seed=12345)
    assert report.interval[1] >= 0.99
