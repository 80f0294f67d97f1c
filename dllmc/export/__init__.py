"""Artifacts in the form of other runtimes, made of their programs; a module a format, each with an `export`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """What was written: the files in `path`, by name, and their bytes. `report`: what there is to say besides."""

    path: Path
    files: Mapping[str, int]
    report: str = ""


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
