"""The artifact directory: manifest, programs as JSON, weights as safetensors, tokenizer files. No code, no pickle.

`manifest.json` lists every file with its size and sha256; reading checks all of it before anything is used.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dllmc.errors import ArtifactError, ConfigError, ProgramError
from dllmc.ir.program import Program, from_json, to_json
from dllmc.memory.verifier import verify
from dllmc.spec import ModelSpec

SCHEMA = 1
SHARD_BYTES = 4 << 30
_MANIFEST = "manifest.json"
_FIELDS = {"schema", "versions", "model", "options", "passes", "memory", "programs", "weights", "tokenizer", "files"}


@dataclass(frozen=True)
class Artifact:
    """An artifact that was read and checked. `manifest` is the parsed `manifest.json`."""

    path: Path
    spec: ModelSpec
    programs: Mapping[str, Program]
    manifest: Mapping[str, Any]

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of `weights`, `arena`, `kv_pool`, `state`, and their `total`: all that an engine allocates."""
        memory: Mapping[str, int] = self.manifest["memory"]
        return memory

    def load_weights(self) -> dict[str, torch.Tensor]:
        """Every weight and constant by name, memory-mapped."""
        weights = {}
        for name in self.manifest["weights"]:
            with safe_open(self.path / name, framework="pt") as shard:
                weights.update({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118
        return weights


def write(
    out: Path,
    *,
    spec: ModelSpec,
    programs: Mapping[str, Program],
    tensors: Mapping[str, torch.Tensor],
    tokenizer_files: Iterable[Path],
    options: Mapping[str, Any],
    passes: list[dict[str, Any]],
    versions: Mapping[str, str],
) -> Artifact:
    """Write an artifact at `out`: built beside it, then moved into place. An older artifact there is replaced.

    `tensors` holds the weights and constants that the programs name, by name. Raises `ArtifactError`.
    """
    if out.exists() and not (out / _MANIFEST).is_file():
        raise ArtifactError(f"{out} exists and is no artifact (it has no {_MANIFEST}); choose another output directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (building / "programs").mkdir()
        for name, program in programs.items():
            (building / "programs" / f"{name}.json").write_text(json.dumps(to_json(program), indent=1) + "\n")
        shards = list(_write_weights(building, tensors))
        tokenizer = [shutil.copyfile(file, building / file.name).name for file in tokenizer_files]
        files = sorted(path for path in building.rglob("*") if path.is_file())
        manifest = {
            "schema": SCHEMA,
            "versions": dict(versions),
            "model": spec.to_dict(),
            "options": dict(options),
            "passes": passes,
            "memory": _memory(programs),
            "programs": sorted(programs),
            "weights": shards,
            "tokenizer": sorted(tokenizer),
            "files": {
                str(path.relative_to(building)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                for path in files
            },
        }
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        os.chmod(building, 0o755)
        if out.exists():
            shutil.rmtree(out)
        building.rename(out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return read(out)


def read(path: str | Path) -> Artifact:
    """Open an artifact: the manifest, every file's name, size and hash, every program and its plan are checked.

    Raises `ArtifactError` naming file and field.
    """
    path = Path(path)
    manifest = _load_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise ArtifactError(f"{path / _MANIFEST}: expected an artifact's manifest with a field 'schema'")
    if manifest["schema"] != SCHEMA:
        raise ArtifactError(
            f"{path / _MANIFEST}: schema {manifest['schema']}, but this version of dllmc reads {SCHEMA}; "
            "compile the model again with this version"
        )
    if set(manifest) != _FIELDS:
        odd = sorted(set(manifest) ^ _FIELDS)
        raise ArtifactError(f"{path / _MANIFEST}: missing or unknown fields {odd}")
    for name, entry in manifest["files"].items():
        _check_file(path, name, entry)
    named = [f"programs/{name}.json" for name in manifest["programs"]] + manifest["weights"] + manifest["tokenizer"]
    if sorted(named) != sorted(manifest["files"]):
        odd = sorted(set(named) ^ set(manifest["files"]))
        raise ArtifactError(f"{path / _MANIFEST}: files {odd} are listed in one place and not in the other")
    programs = {}
    try:
        spec = ModelSpec.from_dict(manifest["model"])
        for name in manifest["programs"]:
            file = path / "programs" / f"{name}.json"
            programs[name] = from_json(_load_json(file), str(file))
            verify(programs[name])
    except (ProgramError, ConfigError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    if manifest["memory"] != _memory(programs):
        raise ArtifactError(f"{path / _MANIFEST}: field 'memory' does not match the programs: {manifest['memory']}")
    _check_weights(path, manifest["weights"], programs)
    return Artifact(path, spec, programs, manifest)


def _memory(programs: Mapping[str, Program]) -> dict[str, int]:
    parts = {
        "weights": max(program.weight_bytes for program in programs.values()),
        "arena": max(program.arena_bytes or 0 for program in programs.values()),
        "kv_pool": 0,
        "state": max(program.state_bytes for program in programs.values()),
    }
    return parts | {"total": sum(parts.values())}


def _write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    for number, shard in enumerate(shards, start=1):
        file = f"weights-{number:05d}.safetensors"
        save_file(shard, folder / file)
        yield file


def _check_file(path: Path, name: str, entry: Any) -> None:
    parts = name.split("/")
    if not re.fullmatch(r"[\w./-]+", name) or any(part in ("", ".", "..") for part in parts):
        raise ArtifactError(f"{path / _MANIFEST}: file name {name!r} does not stay below the artifact's directory")
    file = path
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise ArtifactError(f"{file}: a link; an artifact holds its own files only")
    if not file.is_file():
        raise ArtifactError(f"{file}: listed in the manifest, but there is no such file")
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        raise ArtifactError(f"{path / _MANIFEST}: files[{name!r}]: expected bytes and sha256, found {entry!r}")
    if (size := file.stat().st_size) != entry["bytes"]:
        raise ArtifactError(f"{file}: expected {entry['bytes']} bytes, found {size}; copy the artifact again")
    if (digest := _sha256(file)) != entry["sha256"]:
        raise ArtifactError(f"{file}: expected sha256 {entry['sha256']}, found {digest}; copy the artifact again")


def _check_weights(path: Path, shards: list[str], programs: Mapping[str, Program]) -> None:
    found: dict[str, tuple[list[int], str]] = {}
    for shard in shards:
        try:
            with safe_open(path / shard, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(key)
                    found[key] = (list(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ArtifactError(f"{path / shard}: not a safetensors file: {error}") from error
    for program in programs.values():
        for name, tensor in program.weights.items():
            wanted = [dim.at(program.maxima) for dim in tensor.shape], _SAFETENSORS_DTYPES[tensor.dtype]
            if found.get(name) != wanted:
                raise ArtifactError(f"{path}: weight {name!r}: expected {wanted}, found {found.get(name, 'nothing')}")


_SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{file}: no such file; expected a directory that `dllmc compile` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not readable as JSON: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
