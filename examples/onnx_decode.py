"""Decode with an ONNX export, numpy and onnxruntime: no torch, no dllmc.

dllmc export tiny.dllmc --format onnx --out tiny-onnx
python examples/onnx_decode.py tiny-onnx "sudoku:
1040
3401
0004
4012
" --gen-length 20 --cached
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]


class Step:
    """The exported phases of a model, and the keys and values of one sequence."""

    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / "model.json").read_text())
        self.models = {file.stem: onnxruntime.InferenceSession(file) for file in folder.glob("*.onnx")}
        self.caches: dict[str, Array] = {}

    def reserve(self, tokens: int) -> None:
        """Make room in the caches for so many tokens."""
        pages = -(-tokens // self.about["page_tokens"])
        for name, cache in self.about["caches"].items():
            shape = [pages if dim == "pages" else dim for dim in cache["shape"]]
            self.caches[name] = np.zeros(shape, cache["dtype"])

    def __call__(self, phase: str, ids: Array, masked: Array, span: tuple[int, int], kept: int) -> tuple[Array, Array]:
        """Tokens and confidences of the masked positions. span: the block's first position and the one behind."""
        first, end = span if phase == "reuse" else (0, len(ids))
        rows, one = masked - first, np.ones(1, np.int64)
        model = self.models[phase]
        width = next((one.shape[1] for one in model.get_inputs() if one.name == "page_table"), 0)
        inputs = {
            "token_ids": ids[first:end],
            "positions": np.arange(first, end),
            "segments": np.array([[0, end - first]]),
            "rows": rows,
            "row_spans": np.array([[0, len(rows)]]),
            "row_segment": np.zeros_like(rows),
            "row_position": masked,
            "row_target": np.full_like(rows, -1),
            # Greedy, by confidence, without guidance; each of one request.
            "guided": np.zeros(0, np.int64),
            "guidance": np.zeros(0, np.float32),
            "temperature": np.zeros(1, np.float32),
            "top_k": 0 * one,
            "top_p": np.ones(1, np.float32),
            "confidence_rule": 0 * one,
            "seed": 0 * one,
            "step": 0 * one,
            "suppressed": np.full((1, 64), -1),
            # A Refresh keeps what is outside the span, all heads the same; Reuse reads it.
            "active": np.arange(*span),
            "keeping": np.array([[*span, kept, 0, 1]]),
            "cached": kept * one,
            "page_table": np.arange(width)[None],
            **self.caches,
        }
        names = [output.name for output in model.get_outputs()]
        found = dict(zip(names, model.run(names, {i.name: inputs[i.name] for i in model.get_inputs()}), strict=True))
        self.caches |= {name: found[f"{name}.updated"] for name in self.caches if f"{name}.updated" in found}
        return found["token"], found["confidence"]


def decode(step: Step, prompt: list[int], gen_length: int, block_length: int, steps: int, cached: bool) -> list[int]:
    """The completion: block by block, in each of its steps the most confident of its masked positions."""
    model: Mapping[str, Any] = step.about["model"]
    ids = np.array(prompt + [model["mask_id"]] * gen_length)
    if cached:
        step.reserve(len(ids))
    for start in range(len(prompt), len(ids), block_length):
        end = min(start + block_length, len(ids))
        span = max(start - model["shifted"], 0), end
        for number, count in enumerate(counts(end - start, max(1, steps * block_length // gen_length))):
            phase = "dense" if not cached else "reuse" if number else "refresh"
            masked = start + np.flatnonzero(ids[start:end] == model["mask_id"])
            token, confidence = step(phase, ids, masked, span, len(ids) - (span[1] - span[0]))
            best = np.argsort(-confidence, kind="stable")[:count]
            ids[masked[best]] = token[best]
    return [int(token) for token in ids[len(prompt) :]]


def counts(masked: int, steps: int) -> Iterator[int]:
    """How many tokens each step commits: the same, and one more in the first ones until all are."""
    return (masked // steps + (number < masked % steps) for number in range(min(steps, masked)))


def main() -> None:
    """Decode the prompt of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `dllmc export --format onnx` wrote")
    parser.add_argument("prompt")
    parser.add_argument("--gen-length", type=int, default=32)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--steps", type=int, help="forward passes; one a token if not given")
    parser.add_argument("--cached", action="store_true", help="one Refresh a block, then Reuse")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.folder / "tokenizer.json"))
    prompt = tokenizer.encode(given.prompt, add_special_tokens=False).ids
    steps = given.steps or given.gen_length
    block_length = min(given.block_length, given.gen_length)
    step = Step(given.folder)
    completion = decode(step, prompt, given.gen_length, block_length, steps, given.cached)
    ends = [completion.index(end) for end in step.about["model"]["end_ids"] if end in completion]
    print(tokenizer.decode(completion[: min(ends, default=len(completion))]))


if __name__ == "__main__":
    main()
