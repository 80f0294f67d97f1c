"""A task of one's own: a file with one JSON object a line, `{"input": prompt, "output": right completion}`."""

import json
import random
from pathlib import Path

from dllmc.errors import TaskError
from dllmc.tasks.base import Example, Task


def task_of(file: Path) -> Task:
    """The examples of a file; a completion is right if it equals `output` but for white space around it.

    `examples(count, seed)` are `count` of them chosen by the seed, or all in order if there are no more. Raises
    `TaskError` with the line for anything that is not an object with those two texts.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{file}: cannot be read: {error}") from None
    listed = [_example(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not listed:
        raise TaskError(f"{file}: no examples; expected one JSON object a line with the fields input and output")

    def examples(count: int, seed: int) -> list[Example]:
        return listed if count >= len(listed) else random.Random(seed).sample(listed, count)

    return Task(file.name, examples, lambda example, text: text.strip() == example.output.strip(), gen_length=None)


def _example(line: str, where: str) -> Example:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    match fields:
        case {"input": str(prompt), "output": str(completion)}:
            return Example(prompt, completion)
    raise TaskError(f"{where}: expected an object with the texts input and output, found {line[:80]}")
