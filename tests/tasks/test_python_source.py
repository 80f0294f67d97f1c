"""The standard library as text: two halves without a common package, and gaps in the held-out one."""

import json
from pathlib import Path

import pytest

from dllmc.errors import TaskError
from dllmc.tasks.python_source import Gap, gaps, modules


def encode(text: str) -> list[int]:
    """One token a character, none of them 0."""
    return [ord(c) for c in text]


def test_no_package_is_in_both_halves() -> None:
    """Known modules are read as they are; a tenth or so is held out, whole packages at a time."""
    trained, held_out = modules(held_out=False), modules(held_out=True)
    assert trained["json.decoder"] == Path(json.decoder.__file__).read_text("utf-8")
    assert {"calendar", "tarfile", "statistics"} <= held_out.keys()
    packages = [{name.partition(".")[0] for name in half} for half in (trained, held_out)]
    assert not packages[0] & packages[1]
    share = sum(map(len, held_out.values())) / sum(map(len, (*trained.values(), *held_out.values())))
    assert 0.04 <= share <= 0.2


@pytest.mark.parametrize("held_out", [True, False])
def test_tests_and_generated_tables_are_left_out(held_out: bool) -> None:
    names = modules(held_out)
    assert not [name for name in names if name.startswith(("test", "encodings", "lib2to3")) or ".test" in name]


def test_gaps_lie_in_windows_of_held_out_source() -> None:
    """Every window is a piece of the stream of modules; a gap never begins the window, and the seed decides."""
    stream = "\0".join([*modules(held_out=True).values(), ""])
    drawn = gaps(encode, 0, count=20, seed=5, window=100, length=32)
    assert drawn == gaps(encode, 0, count=20, seed=5, window=100, length=32)
    for gap in drawn:
        assert len(gap.window) == 100
        assert "".join(map(chr, gap.window)) in stream
        assert 1 <= gap.start <= 68
        assert gap.length == 32
    assert len({tuple(gap.window) for gap in drawn}) == 20


def test_the_window_may_leave_one_place_for_the_gap() -> None:
    drawn = gaps(encode, 0, count=5, seed=0, window=9, length=8)
    assert [gap == Gap(gap.window, 1, 8) for gap in drawn] == [True] * 5


@pytest.mark.parametrize(("window", "length"), [(8, 8), (8, 0), (10**9, 32)])
def test_impossible_gaps_are_an_error(window: int, length: int) -> None:
    with pytest.raises(TaskError, match=f"gaps of {length} in windows of {window} tokens: the held-out modules have"):
        gaps(encode, 0, 1, 0, window, length)
