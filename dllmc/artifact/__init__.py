"""The artifact directory: manifest, programs as JSON, weights as safetensors, tokenizer files. No code, no pickle.

`manifest.json` lists every file with its size and sha256; reading checks all of it before anything is used. The format
is described in docs/artifact.md.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dllmc.artifact import directory, documents, manifest, weights
from dllmc.errors import ArtifactError, ConfigError, ProgramError
from dllmc.ir import trace as traces
from dllmc.ir.program import PAGES, Program
from dllmc.ir.program_json import from_json, to_json
from dllmc.memory.verifier import verify
from dllmc.ops import signatures
from dllmc.ops.registry import operator
from dllmc.spec import ModelSpec


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

    @property
    def device(self) -> str:
        """What it was compiled for, one of `dllmc.ir.program.DEVICES`; one for cuda runs on a CPU too."""
        return self.program.device

    def with_pages(self, pages: int) -> "Artifact":
        """The same with another number of pages in the KV pool."""
        programs = {
            name: replace(program, maxima={**program.maxima, PAGES: pages}) if program.caches else program
            for name, program in self.programs.items()
        }
        return replace(self, programs=programs, manifest={**self.manifest, "memory": _memory(programs)})

    def load_weights(self, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Every weight and constant by name on a device; on a CPU memory-mapped where it is stored as it is wanted."""
        own = [self.path / name for name in self.manifest["weights"]]
        linked = [weights.linked_file(self.path, link, str(self.path)) for link in self.manifest["linked"]]
        return weights.load(own, linked, self.manifest["recipes"], self.programs.values(), device)

    def load_trace(self) -> traces.Trace | None:
        """What the passes did, where the artifact tells it. Raises `ArtifactError`."""
        if manifest.TRACE not in self.manifest["files"]:
            return None
        file = self.path / manifest.TRACE
        return traces.from_json(documents.load(file), str(file))


@dataclass(frozen=True)
class Links:
    """Weights that stay where they are: `files` by the name of the tensor that each holds, `recipes` by weight."""

    files: Mapping[str, Path] = field(default_factory=dict)
    recipes: weights.Recipes = field(default_factory=dict)


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
    links: Links | None = None,
) -> Artifact:
    """Write an artifact at `out`: built beside it, then moved into place. An older artifact there is replaced.

    `tensors` holds the weights and constants that the programs name, by name; those that `links` has a recipe for are
    not copied. `trace` is kept for people to look at. Raises `ArtifactError`.
    """
    links = links or Links()
    with directory.replacing(out, manifest.is_one, "artifact") as building:
        (building / "programs").mkdir()
        for name, program in programs.items():
            documents.dump(building / "programs" / f"{name}.json", to_json(program))
        if trace is not None:
            documents.dump(building / manifest.TRACE, traces.to_json(trace), indent=None)
        named = {name for program in programs.values() for name in program.weights}
        recipes = {name: list(links.recipes[name]) for name in sorted(named & links.recipes.keys())}
        linked = sorted({links.files[source] for recipe in recipes.values() for source in recipe})
        shards = list(weights.write(building, sorted(named - recipes.keys()), tensors))
        tokenizer = [shutil.copyfile(file, building / file.name).name for file in tokenizer_files]
        document = {
            "schema": manifest.SCHEMA,
            "versions": dict(versions),
            "model": spec.to_dict(),
            "options": dict(options),
            "passes": passes,
            "memory": _memory(programs),
            "operators": {name: operator(name).version for name in sorted(_operators(programs))},
            "programs": sorted(programs),
            "weights": shards,
            "linked": {weights.link_to(out, file): directory.entry_of(file) for file in linked},
            "recipes": recipes,
            "tokenizer": sorted(tokenizer),
            "files": {
                path.relative_to(building).as_posix(): directory.entry_of(path)
                for path in sorted(building.rglob("*"))
                if path.is_file()
            },
        }
        documents.dump(building / manifest.NAME, manifest.sealed(document))
        written = _read(building, links_from=out, hash_weights=not linked)
    return replace(written, path=out)


def read(path: str | Path, *, hash_weights: bool = True) -> Artifact:
    """Open an artifact: the manifest, every file's name, size and hash, every program and its plan are checked.

    Nothing is run. `hash_weights` false: the bytes of the weights are trusted, for they take long to hash; all else is
    checked. Raises `ArtifactError` naming file and field.
    """
    try:
        return _read(Path(path), Path(path), hash_weights)
    except OSError as error:  # of a name that is too long for the file system, say
        raise ArtifactError(f"{path}: cannot be read: {error}") from error


def in_memory(spec: ModelSpec, programs: Mapping[str, Program]) -> Artifact:
    """An artifact of programs alone, without files: for an engine whose weights come from elsewhere."""
    return Artifact(Path("in memory"), spec, dict(programs), {"memory": _memory(programs), "tokenizer": []})


def _read(path: Path, links_from: Path, hash_weights: bool) -> Artifact:
    where = path / manifest.NAME
    document = manifest.read(where)
    for name, entry in document["files"].items():
        directory.check_file(path, name, entry, str(where), hash_weights or name not in document["weights"])
    named = [f"programs/{name}.json" for name in document["programs"]] + document["weights"] + document["tokenizer"]
    named += [manifest.TRACE] if manifest.TRACE in document["files"] else []
    if sorted(named) != sorted(document["files"]):
        odd = sorted(set(named) ^ set(document["files"]))
        raise ArtifactError(f"{where}: files {odd!r:.200} are listed in one place and not in the other")
    linked = []
    for link, entry in document["linked"].items():
        linked.append(weights.linked_file(links_from, link, str(where)))
        directory.check_content(linked[-1], entry, f"{where}: linked[{link!r}]", hash_weights)
    try:
        spec = ModelSpec.from_dict(document["model"])
    except ConfigError as error:
        raise ArtifactError(f"{where}: field 'model': {error}") from error
    programs = {name: _read_program(path, name) for name in document["programs"]}
    if len(devices := {program.device for program in programs.values()}) > 1:
        raise ArtifactError(f"{where}: programs: expected all for one device, found {', '.join(sorted(devices))}")
    for name in _operators(programs):
        if document["operators"].get(name) != operator(name).version:
            raise ArtifactError(
                f"{where}: operators[{name!r}]: version {document['operators'].get(name)}, but this version of dllmc "
                f"has {operator(name).version}; compile the model again with this version"
            )
    if document["memory"] != _memory(programs):
        raise ArtifactError(f"{where}: field 'memory' does not match the programs: {document['memory']!r:.200}")
    own = [path / name for name in document["weights"]]
    weights.check(str(path), own, linked, document["recipes"], programs.values())
    return Artifact(path, spec, programs, document)


def _read_program(path: Path, name: str) -> Program:
    file = path / "programs" / f"{name}.json"
    document = documents.load(file)
    try:
        program = from_json(document, str(file))
    except ProgramError as error:
        raise ArtifactError(str(error)) from error
    if program.name != name:
        raise ArtifactError(f"{file}: name: expected {name!r}, as the file is named, found {program.name!r:.80}")
    try:
        for instruction, _ in program.calls():
            operator(instruction.op)
        verify(program)
        signatures.check(program)
    except ProgramError as error:
        raise ArtifactError(f"{file}: {error}") from error
    return program


def _operators(programs: Mapping[str, Program]) -> set[str]:
    return {instruction.op for program in programs.values() for instruction, _ in program.calls()}


def _memory(programs: Mapping[str, Program]) -> dict[str, int]:
    parts = {
        "weights": max(program.weight_bytes for program in programs.values()),
        "arena": max(program.arena_bytes or 0 for program in programs.values()),
        "kv_pool": max(program.cache_bytes for program in programs.values()),
        "state": max(program.state_bytes for program in programs.values()),
    }
    return parts | {"total": sum(parts.values())}
