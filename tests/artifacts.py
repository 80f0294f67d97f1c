"""Small artifacts for tests, written without a compiler, and ways to look at them and to forge them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dllmc import artifact
from dllmc.artifact import Artifact
from dllmc.ir.program import Program
from dllmc.ir.trace import Trace
from dllmc.spec import ModelSpec
from tests.programs import TOKENS, planned, program, tensor

MANIFEST = "manifest.json"
WEIGHTS = "weights-00001.safetensors"
PROGRAM = "programs/dense.json"
SPEC = ModelSpec(vocab_size=13, mask_id=12, end_ids=(0,), max_positions=64)


def small_program() -> Program:
    """Copies its weight `w` [2, 3] twice."""
    return planned(
        program(
            {"%a": tensor(2, 3), "%b": tensor(2, 3)},
            [(["w"], ["%a"]), (["%a"], ["%b"])],
            returns=["%b"],
            inputs={"ids": tensor(TOKENS, dtype="int64")},
            weights={"w": tensor(2, 3)},
        )
    )


def write(
    out: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    dense: Program | None = None,
    tokenizer_files: Iterable[Path] = (),
    trace: Trace | None = None,
) -> Artifact:
    """Write an artifact of one program, by default the small one with 0 to 5 as its weight."""
    return artifact.write(
        out,
        spec=SPEC,
        programs={"dense": dense or small_program()},
        tensors={"w": torch.arange(6.0).view(2, 3)} if tensors is None else tensors,
        tokenizer_files=tokenizer_files,
        options={},
        passes=[],
        versions={},
        trace=trace,
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """With the hash that it then has, as a careful forger would."""
    manifest.pop("sha256", None)
    text = json.dumps(manifest, indent=1) + "\n"
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def edit_manifest(folder: Path, **fields: Any) -> None:
    write_manifest(folder, {**read_manifest(folder), **fields})


def entry_of(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def rehash(folder: Path) -> None:
    """Bring the manifest's sizes and hashes up to date, as a careful forger would."""
    edit_manifest(
        folder, files={name: entry_of((folder / name).read_bytes()) for name in read_manifest(folder)["files"]}
    )
