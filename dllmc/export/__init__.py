"""Artifacts in the form of other runtimes, made of their programs; a module a format, each with an `export`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dllmc.artifact import documents
from dllmc.errors import ArtifactError

MODEL = "model.json"
"""What each export has beside its models: the `format`, and what those who run it must know."""


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


def is_export(folder: Path, form: str) -> bool:
    """Whether a directory is an export of that format."""
    try:
        document = documents.load(folder / MODEL)
    except ArtifactError:
        return False
    return isinstance(document, dict) and document.get("format") == form
