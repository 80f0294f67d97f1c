"""Compile the bundled checkpoint, solve a few Sudokus that it never saw, print the memory plan.

make demo
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import dllmc
from dllmc.cli import print_memory

HERE = Path(__file__).parent / "tiny-llada"
sys.path.insert(0, str(HERE))
from sudoku import COMPLETION_LENGTH, is_solved, prompt_of, puzzles  # noqa: E402

PUZZLES = 4


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = dllmc.compile(HERE, f"{folder}/tiny-llada")
        engine = dllmc.load(artifact.path)
        fresh = puzzles(np.random.default_rng(), held_out=True)
        prompts = [prompt_of(next(fresh)[0]) for _ in range(PUZZLES)]
        params = dllmc.SamplingParams(gen_length=COMPLETION_LENGTH, block_length=COMPLETION_LENGTH)
        results = engine.generate(prompts, params)
        for prompt, result in zip(prompts, results, strict=True):
            rows = zip(prompt.split("\n")[1:5], result.text.split("\n"), strict=False)
            print("\n".join(f"  {given.replace('0', '.')}   ->   {solved}" for given, solved in rows))
            print(f"  {'solved' if is_solved(prompt, result.text) else 'not solved'}\n")
        print_memory(artifact)


if __name__ == "__main__":
    main()
