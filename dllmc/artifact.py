"""The artifact directory: manifest, programs as JSON, weights as safetensors, tokenizer files. No code, no pickle.

`manifest.json` lists every file with its size and sha256; reading checks all of it before anything is used.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dllmc.errors import ArtifactError, ConfigError, ProgramError
from dllmc.ir import trace as traces
from dllmc.ir.program import PAGES, Program
from dllmc.ir.program_json import from_json, to_json
from dllmc.memory.verifier import verify
from dllmc.ops.registry import operator
from dllmc.spec import ModelSpec

SCHEMA = 1
SHARD_BYTES = 4 << 30
_MANIFEST, _TRACE = "manifest.json", "trace.json"
_FIELDS: Mapping[str, type] = {
    "schema": int,
    "versions": dict,
    "model": dict,
    "options": dict,
    "passes": list,
    "memory": dict,
    "programs": list,
    "weights": list,
    "tokenizer": list,
    "files": dict,
}


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

    @property
    def program(self) -> Program:
        """The program that runs any step; others run what needs a part of it, in the same arena."""
        return self.programs.get("mixed") or self.programs["dense"]

    def with_pages(self, pages: int) -> "Artifact":
        """The same with another number of pages in the KV pool."""
        programs = {
            name: replace(program, maxima={**program.maxima, PAGES: pages}) if program.caches else program
            for name, program in self.programs.items()
        }
        return replace(self, programs=programs, manifest={**self.manifest, "memory": _memory(programs)})

    def load_weights(self) -> dict[str, torch.Tensor]:
        """Every weight and constant by name, memory-mapped."""
        weights = {}
        for name in self.manifest["weights"]:
            with safe_open(self.path / name, framework="pt") as shard:
                weights.update({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118
        return weights

    def load_trace(self) -> traces.Trace | None:
        """What the passes did, where the artifact tells it. Raises `ArtifactError`."""
        if _TRACE not in self.manifest["files"]:
            return None
        return traces.from_json(_load_json(self.path / _TRACE), str(self.path / _TRACE))


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
    trace: traces.Trace | None = None,
) -> Artifact:
    """Write an artifact at `out`: built beside it, then moved into place. An older artifact there is replaced.

    `tensors` holds the weights and constants that the programs name, by name. `trace` is kept for people to look at.
    Raises `ArtifactError`.
    """
    if out.exists() and not _is_artifact(out):
        raise ArtifactError(f"{out} exists and is no artifact; choose another output directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            building = Path(scratch) / "new"
            (building / "programs").mkdir(parents=True)
            for name, program in programs.items():
                _write_json(building / "programs" / f"{name}.json", to_json(program))
            if trace is not None:
                (building / _TRACE).write_text(json.dumps(traces.to_json(trace), separators=(",", ":")), "utf-8")
            names = sorted({name for program in programs.values() for name in program.weights})
            shards = list(_write_weights(building, names, tensors))
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
                    path.relative_to(building).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                    for path in files
                },
            }
            _write_json(building / _MANIFEST, manifest)
            written = read(building)
            if out.exists():
                out.rename(Path(scratch) / "old")
            building.rename(out)
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written: {error}") from error
    return replace(written, path=out)


def read(path: str | Path) -> Artifact:
    """Open an artifact: the manifest, every file's name, size and hash, every program and its plan are checked.

    Nothing is run. Raises `ArtifactError` naming file and field.
    """
    path = Path(path)
    manifest = _read_manifest(path / _MANIFEST)
    for name, entry in manifest["files"].items():
        _check_file(path, name, entry)
    named = [f"programs/{name}.json" for name in manifest["programs"]] + manifest["weights"] + manifest["tokenizer"]
    named += [_TRACE] if _TRACE in manifest["files"] else []
    if sorted(named) != sorted(manifest["files"]):
        odd = sorted(set(named) ^ set(manifest["files"]))
        raise ArtifactError(f"{path / _MANIFEST}: files {odd} are listed in one place and not in the other")
    try:
        spec = ModelSpec.from_dict(manifest["model"])
    except ConfigError as error:
        raise ArtifactError(f"{path / _MANIFEST}: field 'model': {error}") from error
    programs = {name: _read_program(path / "programs" / f"{name}.json") for name in manifest["programs"]}
    if manifest["memory"] != _memory(programs):
        raise ArtifactError(f"{path / _MANIFEST}: field 'memory' does not match the programs: {manifest['memory']}")
    _check_weights(path, manifest["weights"], programs)
    return Artifact(path, spec, programs, manifest)


def _is_artifact(folder: Path) -> bool:
    """Whether a directory may be replaced: it has the manifest of an artifact, of this or another version."""
    try:
        manifest = _load_json(folder / _MANIFEST)
    except ArtifactError:
        return False
    return isinstance(manifest, dict) and {"schema", "programs", "files"} <= manifest.keys()


def _read_manifest(file: Path) -> dict[str, Any]:
    manifest = _load_json(file)
    if not isinstance(manifest, dict) or type(manifest.get("schema")) is not int:
        raise ArtifactError(f"{file}: expected an artifact's manifest with a field 'schema'")
    if manifest["schema"] != SCHEMA:
        raise ArtifactError(
            f"{file}: schema {manifest['schema']}, but this version of dllmc reads {SCHEMA}; "
            "compile the model again with this version"
        )
    if manifest.keys() != _FIELDS.keys():
        raise ArtifactError(f"{file}: missing or unknown fields {sorted(manifest.keys() ^ _FIELDS.keys())}")
    for field, kind in _FIELDS.items():
        if not isinstance(manifest[field], kind):
            raise ArtifactError(f"{file}: field {field!r}: expected a {kind.__name__}, found {manifest[field]!r}")
    for field, kind in (("passes", dict), ("programs", str), ("weights", str), ("tokenizer", str)):
        if not all(isinstance(entry, kind) for entry in manifest[field]):
            raise ArtifactError(f"{file}: field {field!r}: expected a list of {kind.__name__}, found {manifest[field]}")
    if not manifest["programs"]:
        raise ArtifactError(f"{file}: field 'programs': expected at least one program")
    return manifest


def _read_program(file: Path) -> Program:
    document = _load_json(file)
    try:
        program = from_json(document, str(file))
    except ProgramError as error:
        raise ArtifactError(str(error)) from error
    try:
        for instruction, _ in program.calls():
            operator(instruction.op)
        verify(program)
    except ProgramError as error:
        raise ArtifactError(f"{file}: {error}") from error
    return program


def _memory(programs: Mapping[str, Program]) -> dict[str, int]:
    parts = {
        "weights": max(program.weight_bytes for program in programs.values()),
        "arena": max(program.arena_bytes or 0 for program in programs.values()),
        "kv_pool": max(program.cache_bytes for program in programs.values()),
        "state": max(program.state_bytes for program in programs.values()),
    }
    return parts | {"total": sum(parts.values())}


def _write_weights(folder: Path, names: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Tensors are asked for one at a time, since some may be made only then; a shard is written once it is full."""
    shard: dict[str, torch.Tensor] = {}
    files = (f"weights-{number:05d}.safetensors" for number in count(1))
    for name in names:
        try:
            tensor = tensors[name].contiguous()
        except KeyError:
            raise ArtifactError(f"weight {name!r}: a program reads it; expected a tensor, found nothing") from None
        if tensor.is_meta:
            raise ArtifactError(
                f"weight {name!r} is on the meta device and has no bytes to write; give the model its weights, by "
                "load_state_dict(..., assign=True) for instance, and compile it again"
            )
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield _write_shard(folder / next(files), shard)
            shard = {}
        shard[name] = tensor
    yield _write_shard(folder / next(files), shard)


def _write_shard(file: Path, shard: Mapping[str, torch.Tensor]) -> str:
    addresses = set[int]()
    own = {}  # safetensors takes no two names for one memory, which parameters that share their data are
    for name, tensor in shard.items():
        own[name] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    save_file(own, file)
    return file.name


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
    named = {name for program in programs.values() for name in program.weights}
    if unnamed := sorted(found.keys() - named):
        raise ArtifactError(f"{path}: no program has the weights {unnamed}")
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


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
