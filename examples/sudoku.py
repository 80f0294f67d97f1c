"""Compile the bundled checkpoint, solve a few Sudokus that it never saw, print the memory plan.

make demo
"""

import secrets
import tempfile
from pathlib import Path

import dllmc
from dllmc.cli.report import memory_lines
from dllmc.tasks.sudoku import TASK

CHECKPOINT = Path(__file__).parent / "tiny-llada"
PUZZLES = 4


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = dllmc.compile(CHECKPOINT, f"{folder}/tiny-llada")
        engine = dllmc.load(artifact.path)
        puzzles = TASK.examples(PUZZLES, secrets.randbits(32))
        params = dllmc.SamplingParams(gen_length=TASK.gen_length, block_length=TASK.gen_length)
        results = engine.generate([puzzle.input for puzzle in puzzles], params)
        for puzzle, result in zip(puzzles, results, strict=True):
            rows = zip(puzzle.input.split("\n")[1:5], result.text.split("\n"), strict=False)
            print("\n".join(f"  {given.replace('0', '.')}   ->   {solved}" for given, solved in rows))
            print(f"  {'solved' if TASK.is_right(puzzle, result.text) else 'not solved'}\n")
        print("\n".join(memory_lines(artifact)))


if __name__ == "__main__":
    main()
