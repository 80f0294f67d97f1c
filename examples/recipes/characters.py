"""tiny-llada: a LLaDA over characters that solves 4x4 Sudoku and adds numbers.

As LLaDA is fine-tuned: the prompt stays, completions are padded with the end token to one of several widths.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from recipes.base import END, MASK, Batch, config, masked_batch, tokenizer_config
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from dllmc.tasks import addition, sudoku
from dllmc.tasks.base import Example, Task

SPECIAL = ["<|endoftext|>", "<|mdm_mask|>", "<|unknown|>"]
VOCABULARY = SPECIAL + ["\n"] + [chr(c) for c in range(32, 127)]
ID_OF = {token: i for i, token in enumerate(VOCABULARY)}
# Widths of a sequence, and how often a batch has them: mostly as long as the task needs.
SUDOKU_WIDTHS, ADDITION_WIDTHS, SHARES = (47, 59, 91, 155), (20, 45, 77, 141), (0.7, 0.22, 0.05, 0.03)
SUDOKU_BATCH, ADDITION_BATCH = 64, 160


def encode(text: str) -> list[int]:
    """Token ids of a text, one a character."""
    return [ID_OF[c] for c in text]


def decode(ids: Sequence[int]) -> str:
    """Text of token ids, without end tokens."""
    return "".join(VOCABULARY[i] for i in ids if i != END)


def batch_of(examples: Iterable[Example], width: int, rng: np.random.Generator) -> Batch:
    """Sequences [examples, width], a uniform share of each completion masked, at least one token of it."""
    rows, first = [], []
    for example in examples:
        prompt, completion = encode(example.input), encode(example.output)
        rows.append(prompt + completion + [END] * (width - len(prompt) - len(completion)))
        first.append(len(prompt))
    clean, start = np.array(rows), np.array(first)[:, None]
    masked = rng.random(clean.shape) < rng.random((len(rows), 1))
    masked &= np.arange(width) >= start
    masked[np.arange(len(rows)), rng.integers(start[:, 0], width)] = True
    weights = np.full(clean.shape, 1 / masked.sum(), np.float32)
    return masked_batch(*map(torch.from_numpy, (clean, masked, weights)))


@torch.inference_mode()
def accuracy(model: nn.Module, task: Task, count: int, seed: int) -> float:
    """Share of held-out examples answered by dense greedy decoding, one token a step."""
    right, length = 0, task.gen_length
    examples = sorted(task.examples(count, seed), key=lambda e: len(e.input))
    for start, group in groupby(examples, key=lambda e: len(e.input)):
        together = list(group)
        x = torch.tensor([encode(e.input) + [MASK] * length for e in together])
        masked = torch.zeros_like(x, dtype=torch.bool)
        masked[:, start:] = True
        for _ in range(length):
            confidence, token = torch.softmax(model(x), dim=-1).max(dim=-1)
            best = torch.where(masked, confidence, -1.0).argmax(dim=1, keepdim=True)
            x.scatter_(1, best, token.gather(1, best))
            masked.scatter_(1, best, False)
        completions = map(decode, x[:, start:].tolist())
        right += sum(map(task.is_right, together, completions))
    return right / count


class Characters:
    """The recipe."""

    steps, report_every = 2600, 100

    def __init__(self) -> None:
        self.config = config(len(VOCABULARY), layers=4, positions=512, tied=False, dtype="float32")
        self.tokenizer_config = tokenizer_config(SPECIAL)
        self.tokenizer = Tokenizer(models.WordLevel(ID_OF, unk_token=SPECIAL[2]))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        self.tokenizer.decoder = decoders.Fuse()
        self.tokenizer.add_special_tokens(SPECIAL)

    def batches_at(self, seed: int, step: int, steps: int) -> list[Batch]:
        rng = np.random.default_rng((seed, step))
        puzzles = islice(sudoku.puzzles(rng, held_out=False), SUDOKU_BATCH)
        sums = islice(addition.sums(rng, held_out=False), ADDITION_BATCH)
        return [
            batch_of(puzzles, rng.choice(SUDOKU_WIDTHS, p=SHARES), rng),
            batch_of(sums, rng.choice(ADDITION_WIDTHS, p=SHARES), rng),
        ]

    def figures(self, model: nn.Module, final: bool) -> dict[str, Any]:
        count, seed = (2000, 2) if final else (200, 1)
        shares = {f"{task.name}_right": accuracy(model, task, count, seed) for task in (sudoku.TASK, addition.TASK)}
        return {**shares, "examples_of_each": count}


recipe = Characters
