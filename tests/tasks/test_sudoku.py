"""Sudoku: puzzles are held out by their text, and the checker accepts any valid solution."""

import numpy as np

from dllmc.tasks import sudoku
from dllmc.tasks.base import is_held_out

PROMPT = "sudoku:\n1003\n0300\n3210\n4132\n"


def test_all_grids_are_there() -> None:
    """There are 288 grids of 4x4 Sudoku, a known number."""
    assert len(set(sudoku.GRIDS)) == len(sudoku.GRIDS) == 288


def test_checker_by_hand() -> None:
    """A solution must be valid, complete, and keep the givens."""
    assert sudoku.is_solved(PROMPT, "1423\n2341\n3214\n4132")
    for wrong in (
        "2413\n1342\n3214\n4132",
        "1423\n2341\n3214\n4123",
        "1423\n2341\n3214",
        "",
        "1423\n2341\n3214\n41322",
    ):
        assert not sudoku.is_solved(PROMPT, wrong)


def test_examples_are_fresh_and_their_own_solutions_right() -> None:
    """Held-out puzzles with 4 to 12 blanks; the same seed gives the same ones, another seed others."""
    examples = sudoku.TASK.examples(50, 7)
    assert examples == sudoku.TASK.examples(50, 7) != sudoku.TASK.examples(50, 8)
    for example in examples:
        assert sudoku.TASK.is_right(example, example.output)
        assert is_held_out(example.input.removeprefix("sudoku:\n").rstrip("\n"))
        assert 4 <= example.input.count("0") <= 12
        assert len(example.output) < sudoku.TASK.gen_length


def test_training_never_sees_a_held_out_puzzle() -> None:
    trained = sudoku.puzzles(np.random.default_rng(0), held_out=False)
    assert not any(is_held_out(next(trained).input[8:-1]) for _ in range(500))
