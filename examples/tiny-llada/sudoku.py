"""4x4 Sudoku as text: puzzles to train on, fresh puzzles to test with, and a checker that needs no solution.

A prompt is `sudoku:` and four rows of digits, 0 for a blank; the completion is the solved grid.
"""

import itertools
import zlib
from collections.abc import Iterator

import numpy as np

CELLS, ROW = 16, 4
COMPLETION_LENGTH = 19  # sixteen digits and three newlines


def _is_valid(grid: tuple[int, ...]) -> bool:
    rows = [grid[i : i + 4] for i in range(0, CELLS, 4)]
    columns = [grid[i::4] for i in range(4)]
    boxes = [tuple(grid[r + dr + c + dc] for dr in (0, 4) for dc in (0, 1)) for r in (0, 8) for c in (0, 2)]
    return all(sorted(unit) == [1, 2, 3, 4] for unit in (*rows, *columns, *boxes))


GRIDS = tuple(
    grid
    for rows in itertools.product(itertools.permutations((1, 2, 3, 4)), repeat=ROW)
    if _is_valid(grid := tuple(itertools.chain.from_iterable(rows)))
)


def text_of(grid: tuple[int, ...]) -> str:
    """Four lines of four digits, no newline at the end."""
    digits = "".join(map(str, grid))
    return "\n".join(digits[i : i + ROW] for i in range(0, CELLS, ROW))


def prompt_of(puzzle: tuple[int, ...]) -> str:
    """The prompt that asks for the solution of a puzzle (16 cells, 0 = blank)."""
    return f"sudoku:\n{text_of(puzzle)}\n"


def is_held_out(puzzle: tuple[int, ...]) -> bool:
    """One puzzle in eight, chosen by a hash of its text, is never trained on."""
    return zlib.crc32(text_of(puzzle).encode()) % 8 == 0


def puzzles(rng: np.random.Generator, held_out: bool) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Endless (puzzle, solution) pairs with 4 to 12 blanks, from the held-out eighth or from the rest."""
    while True:
        grid = GRIDS[rng.integers(len(GRIDS))]
        blanks = set(rng.permutation(CELLS)[: rng.integers(4, 13)].tolist())
        puzzle = tuple(0 if i in blanks else d for i, d in enumerate(grid))
        if is_held_out(puzzle) == held_out:
            yield puzzle, grid


def is_solved(prompt: str, completion: str) -> bool:
    """Whether the completion is a valid grid that keeps the prompt's givens (any valid solution counts)."""
    lines = completion.split("\n")
    if len(lines) != ROW or any(len(line) != ROW or not set(line) <= set("1234") for line in lines):
        return False
    grid = tuple(map(int, "".join(lines)))
    givens = map(int, prompt.removeprefix("sudoku:\n").replace("\n", ""))
    return _is_valid(grid) and all(given in (0, digit) for given, digit in zip(givens, grid, strict=True))
