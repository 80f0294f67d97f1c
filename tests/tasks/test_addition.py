"""Addition: sums of numbers of one to four digits, held out by their prompt."""

import re
from collections import Counter

import numpy as np

from dllmc.tasks import addition
from dllmc.tasks.base import Example, is_held_out


def test_examples_are_fresh_sums() -> None:
    """Each is held out and adds up; all lengths of a number are about equally frequent."""
    lengths: Counter[int] = Counter()
    for example in addition.TASK.examples(400, 3):
        match = re.fullmatch(r"add:(\d+)\+(\d+)=", example.input)
        assert match
        assert is_held_out(example.input)
        assert int(example.output) == int(match[1]) + int(match[2])
        assert all(str(int(number)) == number for number in match.groups())
        assert len(example.output) < addition.TASK.gen_length
        lengths.update(map(len, match.groups()))
    assert sorted(lengths) == [1, 2, 3, 4]
    assert min(lengths.values()) >= 800 / 4 * 0.7


def test_only_the_sum_is_right() -> None:
    example = Example("add:4821+977=", "5798")
    assert addition.TASK.is_right(example, "5798")
    assert not any(addition.TASK.is_right(example, wrong) for wrong in ("5797", "05798", "57980", "", " 5798"))


def test_training_never_sees_a_held_out_sum() -> None:
    trained = addition.sums(np.random.default_rng(0), held_out=False)
    assert not any(is_held_out(next(trained).input) for _ in range(500))
