"""A task from a file: what a line may be, and what is said of one that is not."""

from pathlib import Path

import pytest

from dllmc.errors import TaskError
from dllmc.tasks.base import Example
from dllmc.tasks.jsonl import task_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.jsonl"


def test_examples_are_the_lines(file: Path) -> None:
    """Other fields and blank lines are ignored; fewer than there are: chosen by the seed, without repetition."""
    file.write_text('{"input": "a", "output": "b", "id": 1}\n\n{"input": "ä\\n", "output": ""}\n')
    task = task_of(file)
    assert task.examples(10, 0) == [Example("a", "b"), Example("ä\n", "")]
    assert task.name == "mine.jsonl"
    many = [f'{{"input": "{i}", "output": "x"}}' for i in range(50)]
    file.write_text("\n".join(many))
    drawn = task_of(file).examples(20, 1)
    assert len(set(drawn)) == 20
    assert drawn == task_of(file).examples(20, 1) != task_of(file).examples(20, 2)


def test_white_space_around_a_completion_does_not_matter(file: Path) -> None:
    file.write_text('{"input": "a", "output": "b c\\n"}')
    task = task_of(file)
    (example,) = task.examples(1, 0)
    assert task.is_right(example, " b c")
    assert not task.is_right(example, "b  c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"input": "a", "output": "b"}\n{"input": "a"}\n', r"mine\.jsonl:2: expected an object with the texts input"),
        ('{"input": 1, "output": "b"}', r"mine\.jsonl:1: expected"),
        ("[1]", r"mine\.jsonl:1: expected"),
        ("\n{input", r"mine\.jsonl:2: not JSON: .* at column 2"),
        ("\n\n", r"mine\.jsonl: no examples"),
    ],
)
def test_bad_files_are_errors_with_their_line(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(TaskError, match=message):
        task_of(file)


def test_a_file_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(TaskError, match=r"mine\.jsonl: cannot be read: .*No such file"):
        task_of(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TaskError, match=r"mine\.jsonl: cannot be read"):
        task_of(file)
