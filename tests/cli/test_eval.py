"""`dllmc eval`: what is printed of an evaluation, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.test_commands import run


def test_what_was_measured(tiny_llada: Path) -> None:
    """Accuracy with its interval, forward passes and speed."""
    result = run("eval", tiny_llada, "--task", "sudoku", "--examples", "4", "--seed", "3")
    assert result.exit_code == 0, result.output
    task, accuracy, passes, speed = result.stdout.splitlines()
    assert task == "task      sudoku, 4 examples"
    assert accuracy == "accuracy  100.0% of answers right (95% interval 51.0% to 100.0%)"
    assert passes == "passes    80 forward passes, 20.0 an example"
    assert re.fullmatch(r"speed     \d+ tokens/s \(80 in \d+\.\d\d s\)", speed)


def test_json(tiny_llada: Path) -> None:
    """The same numbers under stable names; options reach the requests."""
    options = ("--task", "sudoku", "--examples", "4", "--seed", "3", "--threshold", "0.9", "--json")
    document = json.loads(run("eval", tiny_llada, *options).stdout)
    assert list(document) == [
        *("task", "examples", "accuracy", "interval", "forward_passes", "tokens", "seconds", "nll", "nll_interval"),
        "tokens_per_second",
    ]
    assert (document["task"], document["examples"], document["accuracy"]) == ("sudoku", 4, 1.0)
    assert document["forward_passes"] < 80
    assert document["nll"] is None


def test_a_file_of_examples(tiny_llada: Path, tmp_path: Path) -> None:
    """A right and a wrong output; lengths are the caller's."""
    puzzle = "sudoku:\n1003\n0300\n3210\n4132\n"
    file = tmp_path / "mine.jsonl"
    outputs = "1423\n2341\n3214\n4132", "1111"
    file.write_text("\n".join(json.dumps({"input": puzzle, "output": output}) for output in outputs))
    result = run("eval", tiny_llada, "--task", file, "--gen-length", "20", "--block-length", "20")
    assert result.stdout.splitlines()[:2] == [
        "task      mine.jsonl, 2 examples",
        "accuracy  50.0% of answers right (95% interval 9.5% to 90.5%)",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Missing option '--task'"),
        (("--task", "chess"), "unknown task 'chess'; expected sudoku, add, code or a file that ends in .jsonl"),
        (("--task", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
        (("--task", "code", "--gen-length", "8"), "task 'code': gen_length cannot be chosen"),
        (("--task", "sudoku", "--steps", "2", "--threshold", "0.5"), "expected at most one"),
        (("--task", "sudoku", "--examples", "0"), "0 examples; expected at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny_llada: Path, options: tuple[str, ...], message: str) -> None:
    result = run("eval", tiny_llada, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
