"""Several requests in one asyncio program: each is followed while its blocks fill, and all of them share steps.

.venv/bin/python examples/streaming.py
"""

import asyncio
import tempfile
from pathlib import Path

import dllmc

CHECKPOINT = Path(__file__).parent / "tiny-llada"
PROMPTS = {
    "Sudoku": "sudoku:\n1040\n3401\n0004\n4012\n",
    "another": "sudoku:\n1003\n0300\n3210\n4132\n",
    "a sum": "add:4821+977=",
}


async def follow(engine: dllmc.AsyncEngine, name: str, prompt: str) -> str:
    """Print a line for each block of five tokens that is over, and return the completion."""
    params = dllmc.SamplingParams(gen_length=20, block_length=5, threshold=0.9)
    text = ""
    async for update in engine.stream(prompt, params):
        text += update.text
        if update.text:
            print(f"{name:8} {update.text!r}")
    return text


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = dllmc.compile(CHECKPOINT, f"{folder}/tiny-llada")
        async with dllmc.AsyncEngine(dllmc.load(artifact.path)) as engine:
            texts = await asyncio.gather(*(follow(engine, *item) for item in PROMPTS.items()))
            print(*texts, sep="\n\n")
            stats = engine.engine.stats()
            print(f"\n{stats.finished} requests, {stats.tokens} tokens in {stats.steps} steps")


if __name__ == "__main__":
    asyncio.run(main())
