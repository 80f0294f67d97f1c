"""Addition as text: `add:4821+977=` is completed by `5798`. Numbers have one to four digits."""

from collections.abc import Iterator

import numpy as np

from dllmc.tasks.base import Example, Task, is_held_out

MAX_DIGITS = 4


def sums(rng: np.random.Generator, held_out: bool) -> Iterator[Example]:
    """Endless sums from the held-out eighth or from the rest; all lengths of a number are equally frequent."""
    while True:
        a, b = _number(rng), _number(rng)
        prompt = f"add:{a}+{b}="
        if is_held_out(prompt) == held_out:
            yield Example(prompt, str(a + b))


def _number(rng: np.random.Generator) -> int:
    digits = rng.integers(MAX_DIGITS)
    return int(rng.integers(10**digits if digits else 0, 10 ** (digits + 1)))


def _examples(count: int, seed: int) -> list[Example]:
    fresh = sums(np.random.default_rng(seed), held_out=True)
    return [next(fresh) for _ in range(count)]


TASK = Task("add", _examples, lambda example, completion: completion == example.output, gen_length=MAX_DIGITS + 2)
