"""A directory of listed files: written whole or not at all, and checked file by file before one is opened."""

import fcntl
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dllmc.errors import ArtifactError

_HASH = re.compile(r"[0-9a-f]{64}")


@contextmanager
def replacing(out: Path, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """A new directory beside `out`, to be filled; where the block ends it takes the place of `out`, in one step.

    `is_ours` tells which directories may be replaced, those that are `what`. Before, all files are on the disk; a
    process that dies at any moment leaves the old directory or none, and what it leaves beside it the next one clears
    away. Raises `ArtifactError` for another directory, and where the disk does.
    """
    if out.exists() and not is_ours(out):
        raise ArtifactError(f"{out} exists and is no {what}; choose another output directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(out)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
            scratch = Path(name)
            with _locked(scratch):
                building = scratch / "new"
                building.mkdir()
                yield building
                for path in (*building.rglob("*"), building):
                    _flush(path)
                if out.exists():
                    out.rename(scratch / "old")
                building.rename(out)
                _flush(out.parent)
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written: {error}") from error


def entry_of(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def sha256(file: Path) -> str:
    """A file's hash, as a manifest has it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(folder: Path, name: str, entry: Any, where: str, hashed: bool = True) -> None:
    """A listed file lies below the folder, behind no link, and is what its entry says. Raises `ArtifactError`."""
    parts = name.split("/")
    if not re.fullmatch(r"[\w./-]+", name) or any(part in ("", ".", "..") for part in parts):
        raise ArtifactError(f"{where}: file name {name!r} does not stay below the artifact's directory")
    file = folder
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise ArtifactError(f"{file}: a link; an artifact holds its own files only")
    if not file.is_file():
        raise ArtifactError(f"{file}: listed in the manifest, but there is no such file")
    if file.stat().st_nlink > 1:
        raise ArtifactError(f"{file}: a hard link: it could be changed elsewhere; copy the artifact with `cp -r`")
    check_content(file, entry, f"{where}: files[{name!r}]", hashed)


def check_content(file: Path, entry: Any, where: str, hashed: bool = True) -> None:
    """A file has the size, and unless `hashed` is false the hash, that an entry says. Raises `ArtifactError`."""
    known: Mapping[str, Any] = entry if isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} else {}
    if type(known.get("bytes")) is not int or not _HASH.fullmatch(str(known.get("sha256"))):
        raise ArtifactError(f"{where}: expected bytes and sha256, found {entry!r:.200}")
    if (size := file.stat().st_size) != known["bytes"]:
        raise ArtifactError(f"{file}: expected {known['bytes']} bytes, found {size}; copy the artifact again")
    if hashed and (digest := sha256(file)) != known["sha256"]:
        raise ArtifactError(f"{file}: expected sha256 {known['sha256']}, found {digest}; copy the artifact again")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder, for as long as this process lives: others can tell that it is not abandoned."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _clear_abandoned(out: Path) -> None:
    """Remove what processes that died left beside `out`: no one holds it."""
    for building in out.parent.glob(f".{glob.escape(out.name)}.*/new"):
        try:
            with _locked(building.parent):
                shutil.rmtree(building.parent)
        except OSError:  # it is held, or gone
            continue


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
