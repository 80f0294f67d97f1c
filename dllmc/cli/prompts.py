"""Prompts as the command line takes them (options, a file, standard input), and results as JSON lines."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import click

from dllmc.errors import RequestError

if TYPE_CHECKING:
    from dllmc.runtime.request import GenerationResult

STDIN = "-"


@dataclass(frozen=True)
class Given:
    """A prompt as it was given, text or token ids, and where, for messages: "prompts.txt, line 3"."""

    content: str | tuple[int, ...]
    where: str


def collect(texts: Sequence[str], ids: Sequence[tuple[int, ...]], file: str | None) -> list[Given]:
    r"""The prompts of the options, then those of the file; those of standard input where neither gives one.

    `texts` and the lines of a text file may spell a newline as \n. Raises `RequestError`, naming file and line.
    """
    given = [Given(_unescaped(text), f"--prompt {_short(repr(text))}") for text in texts]
    given += [Given(content, f"--prompt-ids {_short(','.join(map(str, content)))}") for content in ids]
    if file is not None:
        given += _read(file)
    elif not given:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError(
                "no prompt: give --prompt TEXT, --prompt-ids IDS or --file FILE, or pipe lines to standard input.",
                click.get_current_context(),
            )
        given = _read(STDIN)
    for prompt in given:
        _require_unicode(prompt)
    return given


def located(error: RequestError, given: Sequence[Given]) -> RequestError:
    """An engine's error, saying where the prompt was given that it knows by its index."""
    for index, prompt in enumerate(given):
        about, found, problem = str(error).partition(f"prompt {index}: ")
        if found and not about:
            return RequestError(f"{prompt.where}: {problem}")
    return error


def record(given: Given, result: "GenerationResult") -> dict[str, Any]:
    """A prompt and its result, as `--json` and `--out` write them."""
    return {
        "input": given.content,
        "output": result.text,
        "token_ids": result.token_ids,
        "forward_passes": result.forward_passes,
        "finish_reason": result.finish_reason,
    }


def json_line(document: Any) -> str:
    """One line of JSON, without its newline."""
    return json.dumps(document, ensure_ascii=False)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a text file that takes its name when all of it is written; an older file of that name is kept until then.

    Raises `click.ClickException` where there can be no such file, before anything is written.
    """
    with replacing_bytes(path) as stream, TextIOWrapper(stream, encoding="utf-8") as text:
        yield text


@contextmanager
def replacing_bytes(path: Path) -> Iterator[BinaryIO]:
    """Write a file of bytes, likewise."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise click.ClickException(f"{path} exists and is no file; give the name of a file to write")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        stream = part.open("xb")
    except OSError as error:
        reason = f"{error.strerror}; give a file in a folder that you can write to"
        raise click.ClickException(f"{path} cannot be written: {reason}") from error
    try:
        with stream:
            yield stream
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(file: str) -> list[Given]:
    where = "standard input" if file == STDIN else file
    if file.endswith(".json"):
        raise RequestError(f"{file}: expected one prompt a line: give a .jsonl file of objects, or a text file")
    try:
        content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror}; give a text file or a .jsonl file of prompts") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: byte {error.start} is not UTF-8; save it as UTF-8") from error
    numbered = [(f"{where}, line {number}", line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]
    parse = _from_json if file.endswith(".jsonl") else _unescaped_given
    given = [parse(line, at) for at, line in numbered if line.strip()]
    if not given:
        raise RequestError(f"{where}: no prompts in it; expected one a line")
    return given


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def _unescaped_given(line: str, where: str) -> Given:
    return Given(_unescaped(line), where)


def _from_json(line: str, where: str) -> Given:
    """`input`, which is text, or the token ids that `record` writes for such a prompt; without it, `token_ids`."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise RequestError(f"{where}: not JSON: {reason}; expected an object such as {_EXAMPLE}") from error
    content = found.get("input", found.get("token_ids")) if isinstance(found, dict) else None
    if isinstance(content, str):
        return Given(content, where)
    if isinstance(content, list) and content and all(type(token) is int for token in content):
        return Given(tuple(content), where)
    raise RequestError(f"{where}: expected an object such as {_EXAMPLE} or {_EXAMPLE_IDS}, found {_short(line)}")


_EXAMPLE, _EXAMPLE_IDS = '{"input": "text"}', '{"token_ids": [12, 7]}'


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require_unicode(given: Given) -> None:
    """A lone surrogate, from bytes that are no UTF-8 or an escape in JSON, is no text that can be tokenised."""
    if not isinstance(given.content, str):
        return
    try:
        given.content.encode()
    except UnicodeEncodeError as error:
        where = given.where.encode(errors="backslashreplace").decode()
        raise RequestError(f"{where}: character {error.start} is half of a surrogate pair; give valid UTF-8") from error
