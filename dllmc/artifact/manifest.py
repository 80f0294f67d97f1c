"""`manifest.json`: every file with its size and hash, and all that is known of a model and how it was compiled.

Its last field is the hash of itself without that field, so that no byte of an artifact goes unnoticed.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllmc.artifact import documents
from dllmc.errors import ArtifactError

SCHEMA = 2
NAME, TRACE = "manifest.json", "trace.json"

_FIELDS: Mapping[str, type] = {
    "schema": int,
    "versions": dict,
    "model": dict,
    "options": dict,
    "passes": list,
    "memory": dict,
    "operators": dict,
    "programs": list,
    "weights": list,
    "linked": dict,
    "recipes": dict,
    "tokenizer": list,
    "files": dict,
    "sha256": str,
}
# What the lists and objects hold that are not checked elsewhere.
_ITEMS: Mapping[str, type] = {
    "versions": str,
    "passes": dict,
    "memory": int,
    "operators": int,
    "programs": str,
    "weights": str,
    "tokenizer": str,
    "recipes": list,
}


def read(file: Path) -> dict[str, Any]:
    """The manifest, its fields of the kinds that they should have. Raises `ArtifactError` naming file and field."""
    if file.is_symlink():
        raise ArtifactError(f"{file}: a link; an artifact holds its own files only")
    manifest: dict[str, Any] = documents.load(file)
    if not isinstance(manifest, dict) or type(manifest.get("schema")) is not int:
        raise ArtifactError(f"{file}: expected an artifact's manifest with a field 'schema'")
    if manifest["schema"] != SCHEMA:
        raise ArtifactError(
            f"{file}: schema {manifest['schema']}, but this version of dllmc reads {SCHEMA}; "
            "compile the model again with this version"
        )
    if manifest.keys() != _FIELDS.keys():
        raise ArtifactError(f"{file}: missing or unknown fields {sorted(manifest.keys() ^ _FIELDS.keys())!r:.200}")
    for field, kind in _FIELDS.items():
        if not isinstance(manifest[field], kind):
            raise ArtifactError(f"{file}: field {field!r}: expected a {kind.__name__}, found {manifest[field]!r:.200}")
    for field, kind in _ITEMS.items():
        found, outer = manifest[field], _FIELDS[field].__name__
        if not all(type(item) is kind for item in (found.values() if isinstance(found, dict) else found)):
            raise ArtifactError(f"{file}: field {field!r}: expected a {outer} of {kind.__name__}, found {found!r:.200}")
    for entry in manifest["passes"]:
        counts = [value for key, value in entry.items() if key != "pass"]
        if type(entry.get("pass")) is not str or not all(type(count) in (int, bool) for count in counts):
            raise ArtifactError(f"{file}: field 'passes': expected a name and counts, found {entry!r:.200}")
    if not manifest["programs"]:
        raise ArtifactError(f"{file}: field 'programs': expected at least one program")
    if file.read_bytes() != documents.text(sealed(manifest)).encode():
        raise ArtifactError(f"{file}: field 'sha256': it is not the hash of the other fields; copy the artifact again")
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its hash."""
    rest = {field: value for field, value in manifest.items() if field != "sha256"}
    return rest | {"sha256": hashlib.sha256(documents.text(rest).encode()).hexdigest()}


def is_one(folder: Path) -> bool:
    """Whether a directory has the manifest of an artifact, of this or another version."""
    try:
        manifest = documents.load(folder / NAME)
    except ArtifactError:
        return False
    return isinstance(manifest, dict) and {"schema", "programs", "files"} <= manifest.keys()
