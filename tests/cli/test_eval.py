"""`dllmc eval`: what is printed of an evaluation, and what is refused."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import pytest

import dllmc
from dllmc.tasks import addition
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
        *("tokens_per_second", "policy", "difference"),
    ]
    assert (document["task"], document["examples"], document["accuracy"]) == ("sudoku", 4, 1.0)
    assert document["forward_passes"] < 80
    assert document["nll"] is None
    assert document["policy"] == asdict(dllmc.CachePolicy(mode="none"))
    assert document["difference"] is None


SWEEP = ("--examples", "6", "--seed", "1", "--delay", "1", "--retention", "1.0,0.25", "--selection", "per_head,shared")


def test_a_sweep_compares_policies_with_dense(tiny_llada: Path) -> None:
    """Each retention with each selection, and what keeps everything once; differences are of the same examples."""
    result = run("eval", tiny_llada, "--task", "add", *SWEEP, "--json")
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    policies = [
        dllmc.CachePolicy(mode="none"),
        dllmc.CachePolicy(delay=1),
        dllmc.CachePolicy(delay=1, retention=0.25),
        dllmc.CachePolicy(delay=1, retention=0.25, selection="shared"),
    ]
    assert [document["policy"] for document in documents] == [asdict(policy) for policy in policies]

    engine, task = dllmc.load(tiny_llada), addition.TASK
    examples = task.examples(6, 1)
    params = dllmc.SamplingParams(gen_length=task.gen_length, block_length=task.gen_length)
    right = [
        [task.is_right(e, engine.generate(e.input, params, policy)[0].text) for e in examples] for policy in policies
    ]
    for document, of_policy in zip(documents, right, strict=True):
        differences = [a - b for a, b in zip(of_policy, right[0], strict=True)]
        assert document["accuracy"] == fmean(of_policy)
        assert document["difference"]["accuracy"] == fmean(differences)
        half = 1.959964 * stdev(differences) / math.sqrt(6)
        assert document["difference"]["interval"] == pytest.approx(
            [fmean(differences) - half, fmean(differences) + half]
        )


def test_a_sweep_is_a_table(tiny_llada: Path) -> None:
    result = run("eval", tiny_llada, "--task", "add", *SWEEP)
    title, header, *rows = result.stdout.splitlines()
    assert title == "add, 6 examples; in brackets 95% intervals, those of differences paired"
    assert re.split(r"  +", header) == ["cache", "accuracy", "to dense", "passes", "tokens/s"]
    assert [re.split(r"  +", row)[0] for row in rows] == ["dense", "all cached", "per_head 0.25", "shared 0.25"]
    assert re.fullmatch(r"dense  .*%\]  +6\.0  +\d+", rows[0])
    assert all(re.search(r"%\]  +[+-]\d+\.\d% \[[+-]\d+\.\d%, [+-]\d+\.\d%\]  +6\.0  +\d+$", row) for row in rows[1:])


def test_a_sweep_is_drawn(tiny_llada: Path, tmp_path: Path) -> None:
    """A line a selection, and dense decoding; the table is printed all the same."""
    file = tmp_path / "sweep.svg"
    result = run("eval", tiny_llada, "--task", "add", *SWEEP, "--plot", file)
    assert result.stdout.startswith("add, 6 examples")
    drawn = file.read_text()
    for text in ("dense", "per-head selection", "shared selection", "retention", "answers that are right"):
        assert f"<!-- {text} -->" in drawn


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
        (("--task", "sudoku", "--retention", "0.5,half"), "'half' is not a valid float"),
        (("--task", "sudoku", "--retention", "0.5,2"), "CachePolicy.retention is 2.0; expected a number in (0, 1]"),
        (("--task", "sudoku", "--selection", "per_head,none"), "'none' is not one of 'per_head', 'shared'"),
        (("--task", "sudoku", "--cache", "none", "--retention", "1,0.5"), "--cache none decodes dense"),
        (("--task", "sudoku", "--plot", "x.png"), "--plot draws scores over retention; give several"),
        (("--task", "sudoku", "--plot", "x.gif"), "x.gif is no picture; give a FILE.png, FILE.svg or FILE.pdf"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny_llada: Path, options: tuple[str, ...], message: str) -> None:
    result = run("eval", tiny_llada, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
