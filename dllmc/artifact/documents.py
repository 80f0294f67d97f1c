"""JSON that may come from anyone: what is read is plain, small enough, and says each thing once."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dllmc.errors import ArtifactError

MAX_BYTES = 1 << 28
"""The largest JSON file that is read; a program of a hundred layers has a few MiB."""

# Characters by which a text could steer the terminal that it is printed on.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def load(file: Path) -> Any:
    """Read a file. Raises `ArtifactError` for one that is absent, too large, or no JSON.

    For keys given twice and NaN too, which readers of JSON take for different things, and for control characters.
    """
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ArtifactError(f"{file}: expected JSON of at most {MAX_BYTES} bytes, found {size}")
        document = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    except FileNotFoundError:
        raise ArtifactError(f"{file}: no such file; expected a directory that `dllmc compile` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not readable as JSON: {error}") from error
    odd = next((found for found in _texts(document) if _CONTROL.search(found)), None)
    if odd is not None:
        raise ArtifactError(f"{file}: a text has control characters: {odd!r:.80}")
    return document


def text(document: Mapping[str, Any], indent: int | None = 1) -> str:
    """What `load` reads back equal. Without an indent it is as small as can be."""
    separators = (",", ":") if indent is None else None
    return json.dumps(document, indent=indent, separators=separators) + "\n"


def dump(file: Path, document: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write a file of that text."""
    file.write_text(text(document, indent), encoding="utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r:.80} is given twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _texts(document: Any) -> Iterator[str]:
    """Every key and every text in a document."""
    waiting = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
