"""4x4 Sudoku as text: puzzles to train on, fresh puzzles to test with, and a checker that needs no solution.

A prompt is `sudoku:` and four rows of digits, 0 for a blank; the completion is the solved grid.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from dllmc.tasks.base import Example, Task, is_held_out

CELLS, ROW = 16, 4
Grid = tuple[int, ...]


def _is_valid(grid: Grid) -> bool:
    rows = [grid[i : i + 4] for i in range(0, CELLS, 4)]
    columns = [grid[i::4] for i in range(4)]
    boxes = [tuple(grid[r + dr + c + dc] for dr in (0, 4) for dc in (0, 1)) for r in (0, 8) for c in (0, 2)]
    return all(sorted(unit) == [1, 2, 3, 4] for unit in (*rows, *columns, *boxes))


def _grids() -> tuple[Grid, ...]:
    """All 288, row by row."""
    grids: list[Grid] = [()]
    for _ in range(ROW):
        rows = itertools.permutations((1, 2, 3, 4))
        extended = itertools.product(grids, tuple(rows))
        grids = [(*grid, *row) for grid, row in extended if all(d not in grid[c::ROW] for c, d in enumerate(row))]
    return tuple(filter(_is_valid, grids))


GRIDS = _grids()


def text_of(grid: Grid) -> str:
    """Four lines of four digits, no newline at the end."""
    digits = "".join(map(str, grid))
    return "\n".join(digits[i : i + ROW] for i in range(0, CELLS, ROW))


def prompt_of(puzzle: Grid) -> str:
    """The prompt that asks for the solution of a puzzle (16 cells, 0 = blank)."""
    return f"sudoku:\n{text_of(puzzle)}\n"


def puzzles(rng: np.random.Generator, held_out: bool) -> Iterator[Example]:
    """Endless puzzles with 4 to 12 blanks and their solutions, from the held-out eighth or from the rest."""
    while True:
        grid = GRIDS[rng.integers(len(GRIDS))]
        blanks = set(rng.permutation(CELLS)[: rng.integers(4, 13)].tolist())
        puzzle = tuple(0 if i in blanks else d for i, d in enumerate(grid))
        if is_held_out(text_of(puzzle)) == held_out:
            yield Example(prompt_of(puzzle), text_of(grid))


def is_solved(prompt: str, completion: str) -> bool:
    """Whether the completion is a valid grid that keeps the prompt's givens (any valid solution counts)."""
    lines = completion.split("\n")
    if len(lines) != ROW or any(len(line) != ROW or not set(line) <= set("1234") for line in lines):
        return False
    grid = tuple(map(int, "".join(lines)))
    givens = map(int, prompt.removeprefix("sudoku:\n").replace("\n", ""))
    return _is_valid(grid) and all(given in (0, digit) for given, digit in zip(givens, grid, strict=True))


def _examples(count: int, seed: int) -> list[Example]:
    fresh = puzzles(np.random.default_rng(seed), held_out=True)
    return [next(fresh) for _ in range(count)]


TASK = Task("sudoku", _examples, lambda example, completion: is_solved(example.input, completion), gen_length=20)
