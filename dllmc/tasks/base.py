"""What a task is: examples that no training run has seen, and a judge of completions."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt, and a completion that answers it."""

    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """`examples(count, seed)` are held-out ones; `is_right(example, completion)` judges what a model wrote."""

    name: str
    examples: Callable[[int, int], list[Example]]
    is_right: Callable[[Example, str], bool]
    gen_length: int | None
    """Tokens that a completion and its end token take at most, one a character; None: as the caller thinks best."""


def is_held_out(key: str) -> bool:
    """One key in eight, chosen by a hash of its text, is never trained on."""
    return zlib.crc32(key.encode()) % 8 == 0
